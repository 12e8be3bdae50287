"""Build the collator of a recipe without loading weights."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer
from transformers.initialization import no_init_weights

from ...data import ConversationCollator
from ...tuner import CromeConfig
from ...vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from ...vlm.image_token import ensure_image_token
from ..errors import StageError
from ..recipe.schema import Backbones, Recipe
from .build import prepare_processor
from .host import host_of, read_config, read_processor
from .previous import check_reader, check_same, local_directory
from .skeleton import composite_config


def recipe_collator(recipe: Recipe) -> ConversationCollator:
    """Build the collator of a recipe's stage, without augmentation.

    Raises:
        StageError: the previous stage's directory, which decides how rows are written, is missing; or as in `build`.
        ValueError, OSError: the backbones' configurations, or the tokenizers, cannot be loaded.
    """
    host = host_of(recipe)
    if host is not None:
        config, processor = read_config(host), read_processor(host, recipe.previous)
    elif recipe.previous is not None:
        directory = local_directory(recipe.previous)
        if not directory.is_dir():
            raise StageError(
                f"previous: {recipe.previous} does not exist yet, and it decides how rows are written. Measure them "
                "by the recipe of the first stage, whose template and tokenizers are the same."
            )
        config = CromeVLMConfig.from_pretrained(directory)
        check_same(recipe, config, CromeConfig.from_pretrained(str(directory)))
        processor = CromeVLMProcessor.from_pretrained(directory)
        check_reader(recipe, processor)
    else:
        assert recipe.backbones is not None  # schema.py has checked it
        config, processor = _of_backbones(recipe.backbones)
    prepare_processor(processor, recipe)
    return ConversationCollator(
        processor,
        max_length=recipe.training.max_length,
        system=recipe.system,
        ends_answers=True,
        **ConversationCollator.limits(config),
    )


def _of_backbones(backbones: Backbones) -> tuple[CromeVLMConfig, CromeVLMProcessor]:
    config = composite_config(backbones)
    with torch.device("meta"), no_init_weights():
        CromeVLMForConditionalGeneration(config)  # the constructor counts the tokens of an image
    tokenizer = AutoTokenizer.from_pretrained(backbones.language, revision=backbones.text_revision)
    config.image_token_id = ensure_image_token(tokenizer)[1]
    config.vision_model_name_or_path = backbones.vision or backbones.instructblip
    config.qformer_model_name_or_path = backbones.instructblip
    return config, CromeVLMProcessor.from_backbones(
        language=tokenizer, config=config, qformer_tokenizer=backbones.qformer_tokenizer
    )
