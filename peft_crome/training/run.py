"""Run a recipe: build, train, write the stage's directory. Started again, it continues from its last checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset

from ..data import Augmentation, ConversationCollator
from .build import build
from .card import stage_card
from .checkpoint import check_free, clear, open_run, save_stage
from .dataset import load_sources, training_rows
from .recipe import Recipe, RecipeError
from .stages import count_trained
from .trainer import CromeTrainer, training_arguments


def train(recipe: Recipe, on_ready: Callable[[dict[str, int], int | None], None] | None = None) -> dict[str, Any]:
    """Train one stage and write `recipe.output`.

    Args:
        recipe: what to do.
        on_ready: told, before the first step, the trained weights per part and the number of rows (None: streamed).
    Returns:
        The record that is written to `crome_stage.json`; the last of its "stages" is this one.
    Raises:
        RecipeError, StageError, ValueError: recipe, previous directory or data are not sound; nothing was written.
    """
    output = Path(recipe.output)
    check_free(output)
    sources = load_sources(recipe)
    counts = [len(source) if isinstance(source, Dataset) else None for source in sources]
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    arguments = training_arguments(recipe, str(checkpoints), int(os.environ.get("WORLD_SIZE", "1")))
    transformers.set_seed(recipe.training.seed)  # before the projections are drawn
    model, processor, previous = build(recipe)
    config = model.get_base_model().config
    collator = ConversationCollator(
        processor,
        augmentation=Augmentation(recipe.images.random_crop, recipe.images.horizontal_flip),
        max_length=recipe.training.max_length,
        system=recipe.system,
        **ConversationCollator.limits(config),
    )
    trained = count_trained(model)
    if on_ready is not None:
        on_ready(trained, None if None in counts else sum(counts))  # type: ignore[arg-type]
    _check_reach(recipe, trained, config.is_encoder_decoder)
    rows = training_rows(recipe, sources, collator.needs_split)
    try:
        trainer = CromeTrainer(
            model=model, args=arguments, settings=recipe.training, train_dataset=rows, data_collator=collator
        )
    except (RuntimeError, ImportError) as error:  # a report_to or an optimiser whose package is not there
        raise RecipeError(f"training.arguments: {error}") from error
    start = time.perf_counter()
    content = [getattr(source, "_fingerprint", None) for source in sources]
    run = {
        **recipe.model_dump(mode="json"),
        "content of data": dict(zip([data.path for data in recipe.data], content, strict=True)),
        "content of previous": hashlib.sha256(json.dumps(previous).encode()).hexdigest(),
    }
    last = open_run(checkpoints, run, trainer.is_world_process_zero())
    trainer.train(resume_from_checkpoint=last)
    record = {
        "stage": recipe.stage,
        "trained": trained,
        "data": [{"path": data.path, "rows": rows} for data, rows in zip(recipe.data, counts, strict=True)],
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


def _check_reach(recipe: Recipe, trained: dict[str, int], is_encoder_decoder: bool) -> None:
    """Refuse keys that this model and stage would not look at."""
    idle = [part for part in recipe.training.learning_rates if part not in trained]
    if idle:
        raise RecipeError(f"training.learning_rates: {idle} do not train here; {list(trained)} do. Take them out.")
    if is_encoder_decoder and recipe.training.max_length is not None:
        raise RecipeError("training.max_length: an encoder-decoder's rows are not cut. Take it out.")
