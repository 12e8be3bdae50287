"""What the adapter reads off a frozen language model."""
