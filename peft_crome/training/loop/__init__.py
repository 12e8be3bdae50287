"""The training loop: transformers' Trainer, and what ours adds to it."""
