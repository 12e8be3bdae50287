"""A tiny random model of every architecture, and the same checks on each.

To add an architecture, write a builder that returns a `Case` and decorate it with `architecture(model_type)`.
"""

from . import audio, blip, documents, gemma, idefics, llava, projectors, qwen, towers, unusual
from .case import AUDIO_TOKEN, IMAGE_TOKEN, REFUSED, VOCABULARY, WIDTH, ZOO, Batch, Case

__all__ = [
    "AUDIO_TOKEN", "IMAGE_TOKEN", "REFUSED", "VOCABULARY", "WIDTH", "ZOO", "Batch", "Case",
    "audio", "blip", "documents", "gemma", "idefics", "llava", "projectors", "qwen", "towers", "unusual",
]  # fmt: skip
