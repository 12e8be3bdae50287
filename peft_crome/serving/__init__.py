"""Serve an adapter with an engine that does not know it: a folded checkpoint, and image embeddings to go with it."""

from .checkpoint import fold
from .encoder import ImageEncoder

__all__ = ["ImageEncoder", "fold"]
