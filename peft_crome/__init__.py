"""CROME for Hugging Face PEFT: a gated bottleneck where text and vision embeddings enter a frozen language model."""

from .registration import register
from .version import __version__

register()

from .features.cache import FeatureCache, cache_features  # noqa: E402
from .sharing.card_details import describe_adapter  # noqa: E402
from .tuner import CromeConfig, CromeLayer, CromeModel  # noqa: E402
from .tuner.guard import SiteReport, check  # noqa: E402
from .tuner.hotswap import hotswap_adapter  # noqa: E402
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
