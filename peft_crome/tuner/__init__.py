"""The PEFT method CROME: configuration, layer, sites, model."""

from .config import CromeConfig
from .layer import CromeLayer, CromeWeights
from .model import CromeModel

__all__ = ["CromeConfig", "CromeLayer", "CromeModel", "CromeWeights"]
