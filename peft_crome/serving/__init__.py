"""Serve an adapter with an engine: by a plug-in, a folded checkpoint, or image embeddings."""

from .encoder import ImageEncoder
from .export import export
from .folded import fold

__all__ = ["ImageEncoder", "export", "fold"]
