"""Let a torchvision that was built for CUDA be imported beside a PyTorch for the CPU, without its operators.

transformers 5.12, for one, offers `AutoImageProcessor` only where torchvision is installed, and a package index may
have no torchvision for the CPU. Image processors resize with PyTorch's own operators.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch


def declare() -> None:
    """Declare torchvision's operators where its library cannot be loaded; nothing computes with them."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    folder = Path(found.origin).parent
    try:
        torch.ops.load_library(str(folder / "_C.so"))
    except OSError:
        text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
        library = torch.library.Library("torchvision", "DEF")
        for name in set(re.findall(r'(?:ops\.torchvision\.|torchvision::|register_meta\(")(\w+)', text)):
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # an operator lives as long as its library
