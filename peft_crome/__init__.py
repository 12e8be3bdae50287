"""CROME for Hugging Face PEFT: a gated bottleneck where text and vision embeddings enter a frozen language model."""

from .registration import register

register()

from .tuner import CromeConfig, CromeLayer, CromeModel  # noqa: E402

__version__ = "0.1.0.dev0"

__all__ = ["CromeConfig", "CromeLayer", "CromeModel", "__version__"]
