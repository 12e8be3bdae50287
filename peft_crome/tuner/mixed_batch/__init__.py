"""A batch in which each row has an adapter of its own."""
