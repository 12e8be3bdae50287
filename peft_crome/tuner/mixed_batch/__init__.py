"""Run batches in which each row has its own adapter."""
