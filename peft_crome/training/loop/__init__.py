"""The training loop: transformers' Trainer and this package's additions."""
