"""Find where embeddings enter a language model."""
