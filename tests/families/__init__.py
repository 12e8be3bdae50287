"""Tiny checkpoints of the model families that people use most, built offline and always alike.

Each has the real model class and the real processor class of its family. The image processor has its published
settings, and the tokenizer, made for the test, has the family's special tokens and chat template.
"""

from . import deepseek, florence, gemma, glm, idefics, kimi, llava, minicpm, mistral, molmo, phi, qwen, tiles
from .family import ABSENT, FAMILIES, Family

__all__ = [
    "ABSENT", "FAMILIES", "Family", "deepseek", "florence", "gemma", "glm", "idefics", "kimi", "llava", "minicpm",
    "mistral", "molmo", "phi", "qwen", "tiles",
]  # fmt: skip
