"""Tiny checkpoints of the model families that people use most. They are built offline and are the same each time.

Each checkpoint has the real model class and the real processor class of its family. The image processor has its
published settings. The tokenizer is made for the tests. It has the family's special tokens and a chat template that
renders the same text as the published one.

Most families need torchvision, which is not in the environment. `make test-families` installs it in a separate
folder (see `packages.txt`). Without it, the tests of those families are skipped.

    from tests.families import FAMILIES
    FAMILIES["qwen2_5_vl"].build(directory)
"""

from . import deepseek, florence, gemma, glm, idefics, kimi, llava, minicpm, mistral, molmo, phi, qwen, tiles
from .family import ABSENT, FAMILIES, Family

__all__ = [
    "ABSENT", "FAMILIES", "Family", "deepseek", "florence", "gemma", "glm", "idefics", "kimi", "llava", "minicpm",
    "mistral", "molmo", "phi", "qwen", "tiles",
]  # fmt: skip
