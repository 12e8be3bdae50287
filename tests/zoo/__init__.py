"""Tiny random models of every architecture, on which the same checks run.

To add an architecture, write a builder that returns a `Case` and decorate it with `architecture(model_type)`.
"""

from . import (
    audio,
    blip,
    connectors,
    crossing,
    gemma,
    idefics,
    llava,
    qwen,
    readers,
    towers,
    unusual,
)
from .case import AUDIO_TOKEN, IMAGE_TOKEN, REFUSED, VOCABULARY, WIDTH, ZOO, Batch, Case

__all__ = [
    "AUDIO_TOKEN", "IMAGE_TOKEN", "REFUSED", "VOCABULARY", "WIDTH", "ZOO", "Batch", "Case",
    "audio", "blip", "connectors", "crossing", "gemma", "idefics", "llava", "qwen", "readers",
    "towers", "unusual",
]  # fmt: skip
