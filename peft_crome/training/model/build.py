"""Build a stage's model from frozen backbones, or from the directory of the previous stage."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig, AutoTokenizer, InstructBlipQFormerConfig

from ...data import CHAT_TEMPLATES
from ...tuner import CromeConfig
from ...vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from ..directory.stage import read_record
from ..errors import StageError
from ..quantization import load_config
from ..recipe.schema import Adapter, Backbones, Recipe
from ..stages import STAGES, modules_to_save
from .host import build_on_host, host_of
from .previous import (
    check_installed,
    check_reader,
    check_same,
    follow_moved_backbones,
    go_on_with,
    load_named,
    local_directory,
    located,
)
from .skeleton import tower_width
from .zero3 import without_zero3


@without_zero3()
def build(recipe: Recipe) -> tuple[PeftModel, Any, dict[str, Any] | None]:
    """Load everything that a stage starts from. Trained weights are in float32, and all others are frozen.

    With `model` in the recipe, modules that train beside the adapter keep that model's dtype.

    Returns:
        The PEFT model, the processor, and the record of the previous stage, or None if it starts from the backbones.
    Raises:
        StageError: the previous directory is incomplete, belongs to a stage that cannot come before, or has another
            architecture than the recipe.
    """
    host = host_of(recipe)
    if host is not None:
        adapted, processor, before = build_on_host(recipe, host)
        prepare_processor(processor, recipe)
        return adapted, processor, before
    stage = STAGES[recipe.stage]
    if recipe.previous is None:
        assert recipe.backbones is not None  # schema.py has checked it
        composite, processor = _from_backbones(recipe.backbones)
        config = CromeConfig(**(recipe.adapter or Adapter()).model_dump())
        previous = None
    else:
        directory = local_directory(recipe.previous)
        previous = read_record(directory)
        before = previous["stages"][-1]["stage"]
        if before not in stage.previous:
            raise StageError(
                f"{recipe.previous} was written by {before!r}; {recipe.stage!r} starts from "
                f"{' or '.join(map(repr, stage.previous)) or 'the backbones alone: leave `previous` out'}."
            )
        config = CromeConfig.from_pretrained(str(directory))
        host = CromeVLMConfig.from_pretrained(directory)
        follow_moved_backbones(recipe, host)
        check_same(recipe, host, config)
        try:
            composite = CromeVLMForConditionalGeneration.from_pretrained(directory, config=host, adapter="ignore")
        except OSError as error:
            raise StageError(f"previous: {error}") from error
        processor = CromeVLMProcessor.from_pretrained(directory)
        check_reader(recipe, processor)
        go_on_with(config, recipe)
    trained = modules_to_save(stage, composite)
    for part in trained:
        getattr(composite, part).float()  # half precision would lose small steps
    config.modules_to_save = trained or None
    prepare_processor(processor, recipe)
    model = get_peft_model(composite, config)
    if previous is not None:
        weights = load_peft_weights(str(directory), device="cpu")
        # PEFT expects the modules that train in full beside the adapter; the composite has them.
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights |= {key: value for key, value in own.items() if ".crome_" not in key}
        loaded = set_peft_model_state_dict(model, weights)
        absent = [key for key in loaded.missing_keys if ".crome_" in key]
        if absent or loaded.unexpected_keys:
            raise StageError(f"{recipe.previous}: missing {absent[:4]}, unexpected {loaded.unexpected_keys[:4]}.")
    return model, processor, previous


def _check_names(backbones: Backbones) -> None:
    """Check that each name can be found, before anything is loaded."""
    revisions = {
        "vision": backbones.vision_revision,
        "instructblip": backbones.vision_revision,
        "language": backbones.text_revision,
    }
    for key, revision in revisions.items():
        if (name := getattr(backbones, key)) is not None:
            load_named(AutoConfig, f"backbones.{key}", name, revision)
    if backbones.qformer_tokenizer is not None:
        size = len(load_named(AutoTokenizer, "backbones.qformer_tokenizer", backbones.qformer_tokenizer))
        known = InstructBlipQFormerConfig(**backbones.qformer).vocab_size if backbones.qformer else size
        if known < size:
            raise StageError(
                f"backbones.qformer.vocab_size: {known} words, and {backbones.qformer_tokenizer!r} has {size}. Write "
                f"vocab_size: {size}."
            )
    for key in ("quantization", "vision_quantization"):
        check_installed(f"backbones.{key}", getattr(backbones, key))


def _from_backbones(backbones: Backbones) -> tuple[Any, CromeVLMProcessor]:
    _check_names(backbones)
    dtype = getattr(torch, backbones.dtype)
    arguments: dict[str, Any] = {
        "language": located(backbones.language),
        "dtype": dtype,
        "quantization_config": load_config(backbones.quantization, dtype),
        "vision_quantization_config": load_config(backbones.vision_quantization, dtype),
        "image_size": backbones.image_size,
        "vision_revision": backbones.vision_revision,
        "text_revision": backbones.text_revision,
        **backbones.image_options(),
    }
    if backbones.instructblip is not None:
        composite = CromeVLMForConditionalGeneration.from_instructblip(located(backbones.instructblip), **arguments)
    else:
        qformer = None
        if backbones.qformer is not None:
            tower = AutoConfig.from_pretrained(backbones.vision, revision=backbones.vision_revision)
            width = tower_width(getattr(tower, "vision_config", tower))
            qformer = {"encoder_hidden_size": width} | backbones.qformer
        composite = CromeVLMForConditionalGeneration.from_backbones(
            vision=located(backbones.vision), qformer=qformer, **arguments
        )
    try:
        processor = CromeVLMProcessor.from_backbones(
            config=composite.config, qformer_tokenizer=backbones.qformer_tokenizer
        )
    except (OSError, ValueError) as error:
        raise StageError(f"backbones: the processor of {backbones.language!r} cannot be loaded: {error}") from error
    if backbones.qformer_tokenizer is not None and processor.qformer_tokenizer is None:
        raise StageError("backbones.qformer_tokenizer: BLIP-2's Q-Former reads no instructions. Take that key out.")
    return composite, processor


def prepare_processor(processor: Any, recipe: Recipe) -> None:
    """Apply a recipe's settings for templates and images to a processor.

    Raises:
        StageError: the processor lacks a setting of the recipe.
    """
    if recipe.chat_template is not None:
        named = recipe.chat_template in CHAT_TEMPLATES and recipe.chat_template != "words"
        if named and not hasattr(processor, "images_after_text"):
            raise StageError(
                f"chat_template: {recipe.chat_template!r} is for joined models. Leave it out, or write words, or a "
                "Jinja template."
            )
        processor.chat_template = CHAT_TEMPLATES.get(recipe.chat_template, recipe.chat_template)
    if recipe.images_after_text is not None:
        if not hasattr(processor, "images_after_text"):
            raise StageError(
                "images_after_text: the chat template of `model` decides where images stand. Take it out."
            )
        processor.images_after_text = recipe.images_after_text
    images = processor.image_processor
    for name, value in (("image_mean", recipe.images.mean), ("image_std", recipe.images.std)):
        if value is not None:
            setattr(images, name, list(value))
    if recipe.images.resample is not None:
        from PIL.Image import Resampling

        images.resample = Resampling[recipe.images.resample.upper()]
