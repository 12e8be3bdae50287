"""Predict the cost of a stage on some GPU, by rows of a forward pass, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from ...backbone.model import input_embeddings
from ...data import ConversationCollator
from ...data.processed import with_template
from ...tuner import CromeConfig
from ...vlm import CromeVLMConfig
from ..errors import StageError
from ..model.host import host_of, place_of_processor, read_processor
from ..model.previous import check_same, follow_moved_backbones, load_named
from ..model.skeleton import composite_config, host_skeleton, skeleton
from ..quantization import Bits
from ..recipe.schema import Adapter, Host, Recipe
from ..stages import STAGES
from .devices import Device
from .memory import StepCost, StepSize, predict_step

TEXT_TOKENS = 128  # default text tokens of a row beside its image
ROWS = (1, 2, 4, 8, 16, 32, 64)


def recipe_skeleton(recipe: Recipe) -> PeftModel:
    """Build the model that a recipe trains on the meta device. Neither weights nor data are read.

    Raises:
        StageError: neither the previous directory nor the backbones exist.
        ValueError: a configuration cannot be loaded.
    """
    stage, adapter = STAGES[recipe.stage], CromeConfig(**(recipe.adapter or Adapter()).model_dump())
    host = host_of(recipe)
    if host is not None:
        return model_skeleton(host.name, host.dtype or "bfloat16", host.quantization)
    if recipe.previous is not None and Path(recipe.previous).is_dir():
        config = CromeVLMConfig.from_pretrained(recipe.previous)
        adapter = CromeConfig.from_pretrained(recipe.previous)
        follow_moved_backbones(recipe, config)
        check_same(recipe, config, adapter)
        return skeleton(config, stage, adapter)
    if recipe.backbones is None:
        raise StageError(
            f"previous: {recipe.previous} does not exist yet, and the recipe does not name its parts. Add its "
            "`backbones` to plan ahead."
        )
    return skeleton(composite_config(recipe.backbones), stage, adapter)


def model_skeleton(name: str, dtype: str, quantization: Bits | None) -> PeftModel:
    """Build a vision-language model with its adapter on the meta device, or a language model with a text branch.

    Raises:
        StageError, ValueError: the configuration cannot be loaded, or belongs to another kind of model.
    """
    config = load_named(AutoConfig, "model", name)
    # Only a row's tokens are known, not which of them are image tokens. An adapter on all tokens costs no less.
    return host_skeleton(config, getattr(torch, dtype), quantization, CromeConfig(branches=["text"]))


def image_tokens(host: Host, directory: str | None = None) -> int:
    """Return the tokens that a model's processor makes of an image of 640 x 480 pixels.

    Args:
        directory: directory of an adapter, which may have the processor that it was trained with.
    Returns:
        The number of tokens; 0 if the model has no processor with a chat template.
    """
    if place_of_processor(host, directory) is None:
        return 0
    processor = read_processor(host, directory)
    if getattr(processor, "image_processor", None) is None or with_template(processor).chat_template is None:
        return 0
    return ConversationCollator(processor).image_tokens


def frozen_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model computes: that of its embedding table."""
    return next(input_embeddings(model).parameters()).dtype  # type: ignore[union-attr]


def costs(
    model: nn.Module, device: Device, tokens: int, *, gradient_checkpointing: bool = False
) -> Iterator[tuple[int, StepCost]]:
    """Yield the cost for each of `ROWS` in a forward pass, up to the first that does not fit.

    Args:
        tokens: tokens of a row, including its image tokens; each row has one image.
    Raises:
        NotPredictable: as in `predict_step`.
    """
    for rows in ROWS:
        size = StepSize(rows, tokens, images=rows)
        cost = predict_step(model, size, gradient_checkpointing=gradient_checkpointing)
        yield rows, cost
        if cost.peak > device.memory:
            return
