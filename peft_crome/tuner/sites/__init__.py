"""Where embeddings enter a language model."""
