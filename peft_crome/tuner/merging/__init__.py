"""Fold a text branch into the embedding table."""
