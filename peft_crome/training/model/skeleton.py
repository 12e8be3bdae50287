"""Build a stage's model on the meta device: its modules, shapes and dtypes, without weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...tuner import CromeConfig
from ...tuner.guard import disarm
from ...vlm import CromeVLMConfig, CromeVLMForConditionalGeneration
from ...vlm.backbones import Loading, language_class, processor_image_size
from ...vlm.blip_parts import PARTS_CLASSES
from ...vlm.configuration_crome_vlm import quantization_to_dict
from ...vlm.vision import build_tower, find_vision_model
from ..quantization import Bits, bits_of, settings
from ..recipe.schema import Backbones
from ..stages import Stage, modules_to_save
from .host import auto_class
from .packed import pack
from .previous import load_named
from .zero3 import without_zero3


def composite_config(backbones: Backbones) -> CromeVLMConfig:
    """Configure the composite of these backbones, from their configurations alone.

    Raises:
        StageError, ValueError: a configuration cannot be loaded, or belongs to no tower or language model.
    """
    dtype = getattr(torch, backbones.dtype)
    language = load_named(AutoConfig, "backbones.language", backbones.language, backbones.text_revision)
    language_class(language)  # raises if it is not a language model
    key = "vision" if backbones.vision is not None else "instructblip"
    name: str = getattr(backbones, key)
    stored = load_named(AutoConfig, f"backbones.{key}", name, backbones.vision_revision)
    tower = stored.vision_config if stored.model_type in PARTS_CLASSES else _tower_config(stored)
    queries, qformer = backbones.num_query_tokens, None
    if backbones.instructblip is not None:
        queries, qformer = stored.num_query_tokens, stored.qformer_config
    elif backbones.qformer is not None:
        width = tower_width(tower)
        qformer = {"encoder_hidden_size": width, "model_type": "instructblip_qformer", **backbones.qformer}
    for part in (language, tower):
        part.dtype = dtype
    return CromeVLMConfig(
        vision_config=tower,
        text_config=language,
        vision_revision=backbones.vision_revision,
        text_revision=backbones.text_revision,
        qformer_revision=backbones.vision_revision if backbones.instructblip is not None else None,
        text_quantization_config=settings(backbones.quantization),
        vision_quantization_config=settings(backbones.vision_quantization),
        image_token_id=language.get_text_config().vocab_size,
        image_size=backbones.image_size or processor_image_size(name, backbones.vision_revision, Loading()),
        qformer_config=qformer,
        **backbones.image_options() | {"num_query_tokens": queries},
    )


def tower_width(tower: PreTrainedConfig) -> int:
    """Return the features of an image patch; a tower with stages has a width for each."""
    return getattr(tower, "hidden_size", None) or tower.hidden_sizes[-1]


@without_zero3()
def skeleton(config: CromeVLMConfig, stage: Stage, adapter: CromeConfig) -> PeftModel:
    """Build a composite with an adapter as `build` does, but on the meta device.

    Args:
        config: the composite's configuration; `dtype` and quantization of its parts determine how they are loaded.
        stage: decides which parts train; they are kept in float32.
        adapter: decides the adapter's size; `modules_to_save` follows from the stage.
    Raises:
        ValueError: a backbone's checkpoint is quantized by another library than bitsandbytes.
    """
    config = copy.deepcopy(config)
    packed = {part: quantization_of(config, part) for part in ("language_model", "vision_tower")}
    with torch.device("meta"), no_init_weights():
        composite = CromeVLMForConditionalGeneration(config).requires_grad_(False)
        composite.language_model.tie_weights()  # part of the skipped initialization
        for part, quantization in packed.items():
            if quantization is not None:
                pack(getattr(composite, part), quantization)
        trained = modules_to_save(stage, composite)
        for part in trained:
            getattr(composite, part).float()
        adapter = copy.deepcopy(adapter)
        adapter.modules_to_save = trained or None
        model = get_peft_model(composite, adapter)
        disarm(composite)  # the guard needs values
    return model


@without_zero3()
def host_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, quantization: Bits | None, adapter: CromeConfig
) -> PeftModel:
    """Build a transformers model with an adapter on the meta device."""
    config = copy.deepcopy(config)
    config.quantization_config = None
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype).requires_grad_(False)
        model.tie_weights()  # part of the skipped initialization
        if quantization is not None:
            pack(model, quantization)
        adapted = get_peft_model(model, copy.deepcopy(adapter))
        disarm(model)
    return adapted


def quantization_of(config: CromeVLMConfig, part: str) -> Bits | None:
    """Return how the weights of "language_model" or "vision_tower" are packed; a checkpoint may be packed already.

    Raises:
        ValueError: they are packed by another library than bitsandbytes.
    """
    which, recipe_key = {
        "vision_tower": ("vision", "vision_quantization"),
        "language_model": ("text", "quantization"),
    }[part]
    part_config = getattr(config, f"{which}_config")
    stored = quantization_to_dict(
        getattr(config, f"{which}_quantization_config") or getattr(part_config, "quantization_config", None)
    )
    bits = bits_of(stored)
    if stored is not None and bits is None:
        raise ValueError(
            f"The {part} is quantized with {stored.get('quant_method')!r}; its memory is predicted for bitsandbytes' "
            f"4 and 8 bits alone. Name the checkpoint that is not quantized, with {recipe_key}: 4bit."
        )
    return bits


def _tower_config(stored: Any) -> Any:
    """Return the configuration of the tower itself, also in a dual model such as CLIP."""
    with torch.device("meta"), no_init_weights():
        return find_vision_model(build_tower(stored)).config
