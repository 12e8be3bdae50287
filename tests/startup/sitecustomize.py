"""Import tests/torchvision_on_cpu.py when an interpreter starts with this folder on PYTHONPATH."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import tests.torchvision_on_cpu  # noqa: F401
