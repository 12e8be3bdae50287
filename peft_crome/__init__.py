"""CROME for Hugging Face PEFT: a gated bottleneck where text and vision embeddings enter a frozen language model."""

from typing import Any

from .backbone.compat import check_installed, has_composite

check_installed()

from .registration import register
from .version import __version__

register()

from .backbone.labeled import logits_at_labels
from .backbone.packed_rows import pack_rows
from .backbone.trainers import CHECKS
from .features.cache import FeatureCache, cache_features
from .sharing.card_details import describe_adapter
from .tuner import CromeConfig, CromeLayer, CromeModel
from .tuner.guard import SiteReport, check
from .tuner.hotswap import hotswap_adapter
from .tuner.pool import AdapterPool

if has_composite():
    from .vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor


def _sample_with_vllm(trainer: Any) -> None:
    ours = (CromeLayer, CromeVLMForConditionalGeneration) if has_composite() else CromeLayer
    if getattr(trainer.args, "use_vllm", False) and any(
        isinstance(module, ours) for module in trainer.model.modules()
    ):
        from .serving.rollouts import prepare

        prepare(trainer)


CHECKS.append(_sample_with_vllm)

__all__ = [
    "AdapterPool",
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
    "logits_at_labels",
    "pack_rows",
]


def __getattr__(name: str) -> Any:
    if name.startswith("CromeVLM"):
        from . import vlm  # raises if transformers is too old

        return getattr(vlm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
