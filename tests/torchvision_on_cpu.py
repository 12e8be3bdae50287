"""Let torchvision's wheels from PyPI, which are built for CUDA, be imported beside a CPU build of PyTorch.

Their compiled operators do not load there, and torchvision's import stops because it describes two of them. Only
detection models need those operators. The transforms, which image and video processors use, are Python. This module
declares the operators when torchvision is first imported, so import it before anything that imports torchvision.
A test that starts a process sets PYTHONPATH to `STARTUP`, whose `sitecustomize.py` imports this module.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

STARTUP = Path(__file__).parent / "startup"


class _Declare(MetaPathFinder):
    """Finds nothing; it acts once, before torchvision is looked up."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        from tests.torchvision_operators import declare

        declare()


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _Declare())
