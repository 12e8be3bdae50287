"""Tiny checkpoints of the model families that people use most, built offline and always alike.

Each has the real model class and the real processor class of its family. The image processor has its published
settings, and the tokenizer, made for the test, has the family's special tokens and a chat template that renders what
the published one renders. Most need torchvision, which is not in the environment: `make test-families` installs it in
a folder of its own (see packages.txt), and without it those families' tests are skipped.

    from tests.families import FAMILIES
    FAMILIES["qwen2_5_vl"].build(directory)
"""

from . import deepseek, florence, gemma, glm, idefics, kimi, llava, minicpm, mistral, molmo, phi, qwen, tiles
from .family import ABSENT, FAMILIES, Family

__all__ = [
    "ABSENT", "FAMILIES", "Family", "deepseek", "florence", "gemma", "glm", "idefics", "kimi", "llava", "minicpm",
    "mistral", "molmo", "phi", "qwen", "tiles",
]  # fmt: skip
