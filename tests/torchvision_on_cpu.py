"""Let torchvision's wheels from PyPI, which are built for CUDA, be imported beside a CPU build of PyTorch.

Their compiled operators do not load there, and torchvision's import stops because it describes some of them. Only
detection models need those operators. The transforms, which image and video processors use, are Python. This module
declares the operators when torchvision is first imported, so import it before anything that imports torchvision.
A test that starts a process sets PYTHONPATH to `STARTUP`, whose `sitecustomize.py` imports this module.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

STARTUP = Path(__file__).parent / "startup"
NAMES = re.compile(r'(?:ops\.torchvision\.|torchvision::|register_meta\(")(\w+)')
_KEPT: list[Any] = []  # an operator lives as long as its library


class _Declare(MetaPathFinder):
    """Declare the operators once, before torchvision is looked up. It never returns a module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        found = importlib.util.find_spec("torchvision")
        if found is not None and found.origin is not None:
            declare(Path(found.origin).parent)


def declare(folder: Path) -> None:
    """Declare torchvision's operators if its library cannot be loaded. Nothing computes with them."""
    import torch

    try:
        torch.ops.load_library(str(folder / "_C.so"))
    except OSError:
        text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
        library = torch.library.Library("torchvision", "DEF")
        for name in sorted(set(NAMES.findall(text))):
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _Declare())
