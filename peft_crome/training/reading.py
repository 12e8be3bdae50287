"""What a recipe reads its rows with; no weights are loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from ..data import ConversationCollator
from ..vlm import CromeVLMProcessor
from ..vlm.image_token import ensure_image_token
from .build import prepare_processor
from .planning import recipe_skeleton
from .recipe import Recipe


def recipe_collator(recipe: Recipe) -> ConversationCollator:
    """The collator of a recipe's stage, without augmentation.

    Raises:
        StageError, ValueError, OSError: the backbones' configurations, or the tokenizers, cannot be had.
    """
    config = recipe_skeleton(recipe).get_base_model().config
    if recipe.previous is not None and Path(recipe.previous).is_dir():
        processor = CromeVLMProcessor.from_pretrained(recipe.previous)
    else:
        said = recipe.backbones
        assert said is not None  # recipe_skeleton has seen to it
        tokenizer = AutoTokenizer.from_pretrained(said.language, revision=said.text_revision or "main")
        config.image_token_id = ensure_image_token(tokenizer)[1]
        config.qformer_model_name_or_path, config.qformer_revision = said.instructblip, said.vision_revision
        processor = CromeVLMProcessor.from_backbones(
            said.vision or said.instructblip, tokenizer, config=config, qformer_tokenizer=said.qformer_tokenizer
        )
    prepare_processor(processor, recipe)
    return ConversationCollator(
        processor,
        max_length=recipe.training.max_length,
        system=recipe.system,
        **ConversationCollator.limits(config),
    )
