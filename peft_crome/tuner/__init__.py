"""The PEFT method CROME: configuration, layer, sites, model."""

from .config import CromeConfig
from .layer import CromeLayer
from .model import CromeModel
from .weights import CromeWeights

__all__ = ["CromeConfig", "CromeLayer", "CromeModel", "CromeWeights"]
