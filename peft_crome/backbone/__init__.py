"""Read what the adapter needs from a frozen language model."""
