"""Run a recipe: build, train, write the stage's directory. A restarted run continues from its last checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..data import Augmentation, ConversationCollator
from ..data.packing import PackingOrder
from ..data.taken import check_rows, shows_more_than_images
from ..features.cache import cache_features
from ..vlm import CromeVLMForConditionalGeneration, CromeVLMProcessor
from .directory.card import stage_card
from .directory.run_folder import clear, only_run, open_run
from .directory.stage import check_free, is_finished, read_record, save_adapter, save_stage
from .errors import RecipeError
from .loop.dataset import content_of, load_sets, teaching_sets, training_rows
from .loop.finite import NamedRows, NotFiniteError, paths_of
from .loop.reports import keep_reports
from .loop.sharding import check_storage, gather_trained, is_sharded, put_trained
from .loop.trainer import CromeTrainer, training_arguments
from .loop.validation import EvaluationCallback, load_questions, scores_of
from .model.build import build
from .model.host import host_of, read_processor
from .planning.preflight import Preflight, preflight
from .recipe.schema import Recipe
from .stages import count_trained, media_that_teach


def train(
    recipe: Recipe, on_ready: Callable[[Preflight], None] | None = None, *, accept_changed_data: bool = False
) -> dict[str, Any]:
    """Train one stage and write `recipe.output`.

    Args:
        recipe: the recipe.
        on_ready: called before the first step with what will train and what it will cost.
        accept_changed_data: continue from the checkpoints of a run although its data or `training.max_length` have
            changed, as after faulty rows were corrected. Rows that the run has seen may come again, in another order.
    Returns:
        The record that is written to `crome_stage.json`. The last of its "stages" is this one.
    Raises:
        RecipeError, StageError, ValueError: the recipe, the previous directory or the data are wrong. Nothing was
            written.
        NotFiniteError: a loss or a gradient is NaN or infinite. The checkpoints stay.
    """
    output = Path(recipe.output)
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    if is_finished(output, checkpoints, recipe.model_dump(mode="json")):
        return _finish(output, checkpoints)
    check_free(output)
    loaded = load_sets(recipe)
    questions = load_questions(recipe.evaluation) if recipe.evaluation is not None else []
    _check_media(recipe, [*(source for _, source in loaded), *(asked.rows for asked in questions)])
    arguments = training_arguments(recipe, str(checkpoints), int(os.environ.get("WORLD_SIZE", "1")))
    transformers.set_seed(recipe.training.seed)  # before the projections are initialized
    model, processor, previous = build(recipe)
    config = model.get_base_model().config
    collator = ConversationCollator(
        processor,
        augmentation=Augmentation(recipe.images.random_crop, recipe.images.horizontal_flip, recipe.images.views),
        max_length=recipe.training.max_length,
        system=recipe.system,
        ends_answers=True,
        seed=recipe.training.seed,
        **ConversationCollator.limits(config),
    )
    trained = count_trained(model)
    _check_reach(recipe, trained, config.is_encoder_decoder)
    if recipe.feature_cache is not None:
        cache_features(model, recipe.feature_cache.directory, recipe.feature_cache.max_gigabytes)
    kinds = media_that_teach(model)
    sets = loaded if kinds is None else teaching_sets(loaded, kinds)
    rows = training_rows(recipe, sets, collator.needs_split)
    try:
        trainer = CromeTrainer(
            model=model,
            args=arguments,
            settings=recipe.training,
            train_dataset=rows,
            data_collator=NamedRows(PackingOrder(collator) if recipe.training.packing else collator),
            image_tokens=collator.image_tokens if recipe.training.group_by_length else 0,
        )
    except (RuntimeError, ImportError) as error:  # the package of report_to or of the optimizer is missing
        raise RecipeError(f"training.arguments: {error}") from error
    if trainer.is_fsdp_enabled:
        check_storage(model, config.get_text_config().dtype)
    trained_on: list[dict[str, Any]] = [
        {"path": data.path, "rows": len(source) if isinstance(source, Dataset) else None} for data, source in sets
    ]
    counts = [item["rows"] for item in trained_on]
    count = None if None in counts else sum(counts)
    report = preflight(trainer, recipe, rows, collator, count)
    if on_ready is not None:
        on_ready(report)
    keep_reports(trainer, output)
    if recipe.evaluation is not None:
        trainer.add_callback(EvaluationCallback(trainer, processor, questions, recipe.evaluation, recipe.system))
    start = time.perf_counter()
    content = {  # two sets may share a path: splits, or configurations
        f"{number}: {data.path}": content_of(data, source) for number, (data, source) in enumerate(loaded)
    }
    run = {
        **recipe.model_dump(mode="json"),
        "content of data": content,
        "content of previous": hashlib.sha256(json.dumps(previous).encode()).hexdigest(),
    }
    with only_run(checkpoints, trainer.is_world_process_zero()):
        check_free(output)  # another run may have finished meanwhile
        last = open_run(checkpoints, run, trainer.is_world_process_zero(), accept_changed_data)
        try:
            trainer.train(resume_from_checkpoint=last)
        except NotFiniteError as error:
            raise error.of(paths_of(error.rows, ((data.path, source) for data, source in loaded))) from None
        record = {
            "stage": recipe.stage,
            "trained": trained,
            "data": trained_on,
            "steps": trainer.state.global_step,
            "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
            "scores": scores_of(trainer.state.log_history, questions),
            "seconds": round(time.perf_counter() - start, 1),
            "resumed": last is not None,  # if True, the seconds cover the last part only
            "recipe": recipe.model_dump(mode="json"),
        }
        whole = {"stages": [*(previous["stages"] if previous else []), record]}
        if is_sharded(model):
            weights = gather_trained(model)
            if trainer.is_world_process_zero():
                # As the first time, since a new frozen Q-Former is initialized again.
                transformers.set_seed(recipe.training.seed)
                model, processor, _ = build(recipe)
                put_trained(model, weights)
        if trainer.is_world_process_zero():
            if isinstance(model.get_base_model(), CromeVLMForConditionalGeneration):
                save_stage(model, processor, output, whole, stage_card(whole, config))
            else:
                save_adapter(model, processor, output, whole)
            clear(checkpoints)
        trainer.accelerator.wait_for_everyone()  # a script's next stage reads what the first process writes
        return whole


def _finish(output: Path, checkpoints: Path) -> dict[str, Any]:
    """Finish a run that was interrupted after its directory was complete."""
    processes = PartialState()
    processes.wait_for_everyone()  # all processes arrive before the checkpoints are removed
    if processes.is_main_process:
        clear(checkpoints)
    return read_record(output)


def _check_media(recipe: Recipe, data: list[Any]) -> None:
    """Check that the model takes the videos and sounds of the rows, before its weights are loaded."""
    data = [rows for rows in data if not isinstance(rows, IterableDataset) and shows_more_than_images(rows)]
    if not data:
        return
    host = host_of(recipe)
    processor = read_processor(host, recipe.previous) if host is not None else CromeVLMProcessor
    for rows in data:
        check_rows(rows, processor)


def _check_reach(recipe: Recipe, trained: dict[str, int], is_encoder_decoder: bool) -> None:
    """Refuse keys that this model and stage would ignore."""
    idle = [part for part in recipe.training.learning_rates if part not in trained]
    if idle:
        raise RecipeError(f"training.learning_rates: {idle} do not train here; {list(trained)} do. Take them out.")
    if is_encoder_decoder and recipe.training.max_length is not None:
        raise RecipeError("training.max_length: an encoder-decoder's rows are not cut. Take it out.")
