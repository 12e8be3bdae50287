"""Run a recipe: build, train, write the stage's directory. Started again, it continues from its last checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset

from ..data import Augmentation, ConversationCollator, check_images, read_llava, split_turns
from ..data.collator import until_last_answer
from .build import build
from .card import stage_card
from .checkpoint import check_free, clear, open_run, save_stage
from .recipe import Recipe
from .stages import count_trained
from .trainer import CromeTrainer, training_arguments


def train(recipe: Recipe, on_ready: Callable[[dict[str, int], int], None] | None = None) -> dict[str, Any]:
    """Train one stage and write `recipe.output`.

    Args:
        recipe: what to do.
        on_ready: told, before the first step, the trained weights per part and the number of rows.
    Returns:
        The record that is written to `crome_stage.json`; the last of its "stages" is this one.
    Raises:
        RecipeError, StageError, ValueError: recipe, previous directory or data are not sound; nothing was written.
    """
    output = Path(recipe.output)
    check_free(output)
    sources = [list(read_llava(data.path, data.images)) for data in recipe.data]
    every = [row for rows in sources for row in rows]
    check_images(every)
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    arguments = training_arguments(recipe, str(checkpoints), int(os.environ.get("WORLD_SIZE", "1")))
    transformers.set_seed(recipe.training.seed)  # before the projections are drawn
    model, processor, previous = build(recipe)
    config = model.get_base_model().config
    collator = ConversationCollator(
        processor,
        is_encoder_decoder=config.is_encoder_decoder,
        augmentation=Augmentation(recipe.images.random_crop, recipe.images.horizontal_flip),
        max_length=recipe.training.max_length,
        max_target_length=_max_target_length(config),
        max_instruction_length=getattr(config.qformer_config, "max_position_embeddings", None),
        system=recipe.system,
    )
    examples = list(split_turns(every)) if collator.needs_split else [until_last_answer(row) for row in every]
    trained = count_trained(model)
    if on_ready is not None:
        on_ready(trained, len(every))
    trainer = CromeTrainer(
        model=model,
        args=arguments,
        settings=recipe.training,
        train_dataset=Dataset.from_list(examples),
        data_collator=collator,
    )
    start = time.perf_counter()
    last = open_run(checkpoints, recipe.model_dump(mode="json"), trainer.is_world_process_zero())
    trainer.train(resume_from_checkpoint=last)
    record = {
        "stage": recipe.stage,
        "trained": trained,
        "data": [{"path": data.path, "rows": len(rows)} for data, rows in zip(recipe.data, sources, strict=True)],
        "steps": trainer.state.global_step,
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": last is not None,  # then the seconds are those of the last part
        "recipe": recipe.model_dump(mode="json"),
    }
    whole = {"stages": [*(previous["stages"] if previous else []), record]}
    if trainer.is_world_process_zero():
        save_stage(model, processor, output, whole, stage_card(whole, config))
        clear(checkpoints)
    trainer.accelerator.wait_for_everyone()  # a script's next stage starts from what the first process writes
    return whole


def _max_target_length(config: Any) -> int | None:
    """Positions of a decoder that learned them; None for one that has no limit, as T5's."""
    if not config.is_encoder_decoder:
        return None
    return getattr(config.text_config, "max_position_embeddings", None)
