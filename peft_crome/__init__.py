"""CROME for Hugging Face PEFT: a gated bottleneck where text and vision embeddings enter a frozen language model."""

__version__ = "0.1.0.dev0"  # first: an adapter records it

from .registration import register

register()

from .card_details import describe_adapter  # noqa: E402
from .feature_cache import FeatureCache, cache_features  # noqa: E402
from .guard import SiteReport, check  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .tuner import CromeConfig, CromeLayer, CromeModel  # noqa: E402
from .vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor  # noqa: E402

__all__ = [
    "CromeConfig",
    "CromeLayer",
    "CromeModel",
    "CromeVLMConfig",
    "CromeVLMForConditionalGeneration",
    "CromeVLMProcessor",
    "FeatureCache",
    "SiteReport",
    "__version__",
    "cache_features",
    "check",
    "describe_adapter",
    "hotswap_adapter",
]
