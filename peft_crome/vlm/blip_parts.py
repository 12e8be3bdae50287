"""Take a trained vision tower, Q-Former and projection out of an InstructBLIP or BLIP-2 checkpoint."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipPreTrainedModel,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_crome_vlm import HUB_ARGUMENTS
from .qformer import QFormer


class InstructBlipParts(InstructBlipPreTrainedModel):
    """An InstructBLIP checkpoint without its language model."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^language_model\."]

    def __init__(self, config: InstructBlipConfig) -> None:
        super().__init__(config)
        _add_parts(self, InstructBlipVisionModel, InstructBlipQFormerModel)


class Blip2Parts(Blip2PreTrainedModel):
    """A BLIP-2 checkpoint without its language model."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^language_model\."]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["query_tokens", "qformer"]  # as upstream

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        _add_parts(self, Blip2VisionModel, Blip2QFormerModel)


PARTS_CLASSES: dict[str, type[PreTrainedModel]] = {
    InstructBlipConfig.model_type: InstructBlipParts,
    Blip2Config.model_type: Blip2Parts,
}


def _add_parts(parts: Any, vision_class: type[PreTrainedModel], qformer_class: type[PreTrainedModel]) -> None:
    config, width = parts.config, parts.config.qformer_config.hidden_size
    parts.vision_model = vision_class(config.vision_config)
    parts.qformer = qformer_class(config.qformer_config)
    parts.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
    parts.language_projection = nn.Linear(width, config.text_config.hidden_size)
    parts.post_init()


def load_parts(name: str, config: PreTrainedConfig | None = None, **arguments: Any) -> Any:
    """Load `vision_model`, `qformer`, `query_tokens` and `language_projection` of a checkpoint.

    Args:
        name: name of an InstructBLIP or BLIP-2 checkpoint.
        config: configuration to use instead of the stored one.
        arguments: arguments of `from_pretrained`.
    Raises:
        ValueError: the checkpoint is of another model type.
    """
    hub = {key: value for key, value in arguments.items() if key in (*HUB_ARGUMENTS, "revision")}
    config = config or AutoConfig.from_pretrained(name, **hub)
    check_has_parts(config, name)
    return PARTS_CLASSES[config.model_type].from_pretrained(name, config=config, **arguments)


def check_has_parts(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint of another model type.

    Raises:
        ValueError: it is neither InstructBLIP nor BLIP-2; gives its name and type.
    """
    if config.model_type not in PARTS_CLASSES:
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint, expected one of {list(PARTS_CLASSES)}. Join other parts "
            "with CromeVLMForConditionalGeneration.from_backbones(vision=..., language=..., qformer=...)."
        )


def qformer_of(parts: Any) -> QFormer:
    """Take the Q-Former and the query tokens from loaded parts, or from a whole InstructBLIP or BLIP-2 model."""
    config = parts.config.qformer_config
    with torch.device("meta"):
        qformer = QFormer(config, parts.query_tokens.shape[1])
    qformer.query_tokens = nn.Parameter(parts.query_tokens.detach().clone())
    qformer.model = parts.qformer
    return qformer
