"""Serve an adapter with an engine that does not know it: a folded checkpoint, and image embeddings to go with it."""

from .encoder import ImageEncoder
from .folded import fold

__all__ = ["ImageEncoder", "fold"]
