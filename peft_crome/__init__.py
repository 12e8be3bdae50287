"""CROME for Hugging Face PEFT: a gated bottleneck where text and vision embeddings enter a frozen language model."""

from .registration import register

register()

from .guard import SiteReport, check  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .tuner import CromeConfig, CromeLayer, CromeModel  # noqa: E402
from .vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor  # noqa: E402

__version__ = "0.1.0.dev0"

__all__ = [
    "CromeConfig",
    "CromeLayer",
    "CromeModel",
    "CromeVLMConfig",
    "CromeVLMForConditionalGeneration",
    "CromeVLMProcessor",
    "SiteReport",
    "__version__",
    "check",
    "hotswap_adapter",
]
