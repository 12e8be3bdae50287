"""Test torchvision beside a CPU build of PyTorch, if torchvision is installed (see tests/families/packages.txt)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torchvision_on_cpu import STARTUP

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision not installed")

RESIZE = """
import torch, transformers
from torchvision.transforms.v2 import functional
assert functional.resize(torch.rand(3, 20, 30), [8, 8]).shape == (3, 8, 8)
transformers.Qwen2VLVideoProcessor()
"""


def test_a_process_of_its_own_can_use_transforms() -> None:
    places = [str(Path(__file__).parents[1]), str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-c", RESIZE], env=environment, check=True, timeout=300)
