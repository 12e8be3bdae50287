"""Evaluate by free generation while a stage trains, without any effect on the run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from ...data import check_files, read_rows
from ...data.instructions import check_instructions
from ...evaluation.answers import generate_answers
from ...evaluation.metrics import check_metrics, plain, score
from ..errors import RecipeError
from ..recipe.schema import Evaluation


@dataclass(frozen=True)
class QuestionSet:
    """A loaded data set of a recipe's section `evaluation`.

    Args:
        label: label of its scores.
        path: path that it comes from.
        metrics: names of the metrics.
        rows: rows in memory.
    """

    label: str
    path: str
    metrics: tuple[str, ...]
    rows: list[dict[str, Any]]

    def key(self, metric: str) -> str:
        """Return a score's name in the log; TensorBoard and W&B show it under "eval"."""
        return f"eval_{self.label}_{metric}"


def load_questions(said: Evaluation) -> list[QuestionSet]:
    """Read the data sets of an evaluation; check that their files exist and that the metrics have their inputs.

    Raises:
        FileNotFoundError, RecipeError: a file or a value is missing. The message names the key.
    """
    sets = []
    for number, questions in enumerate(said.data):
        source = questions.model_dump(exclude={"label", "metrics"})
        try:
            rows = list(islice(read_rows(**source), said.max_rows))
            if not rows:
                raise ValueError(f"{questions.path} holds no rows.")
            check_files(rows)
            check_metrics(rows, questions.metrics)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"evaluation.data.{number}: {error}") from error
        sets.append(QuestionSet(questions.called, questions.path, tuple(questions.metrics), rows))
    return sets


@contextmanager
def same_draws() -> Iterator[None]:
    """When the block ends, restore the states of all random number generators that checkpoints keep."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class EvaluationCallback(TrainerCallback):
    """Answer every set each `settings.steps` steps and after the last one. `Trainer.log` gets the scores.

    Each process answers its share, and all processes then have all answers.

    Args:
        trainer: the trainer whose model answers and whose log gets the scores.
        processor: the model's processor.
        sets: the result of `load_questions`.
        settings: the recipe's section `evaluation`.
        system: a system message for conversations that have none.
    Raises:
        RecipeError: a Q-Former cannot read an instruction. The message names the row.
    """

    def __init__(
        self,
        trainer: Trainer,
        processor: Any,
        sets: list[QuestionSet],
        settings: Evaluation,
        system: str | None = None,
    ) -> None:
        self.trainer = trainer
        self.processor = processor
        self.sets = sets
        self.settings = settings
        self.system = system
        for number, questions in enumerate(sets):
            try:
                check_instructions(processor, trainer.model.get_base_model().config, questions.rows)
            except ValueError as error:
                raise RecipeError(f"evaluation.data.{number}: {error}") from error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.settings.steps and state.global_step < state.max_steps:
            return
        scores: dict[str, float] = {}
        with same_draws():
            for questions in self.sets:
                answers = self._answers(questions.rows)
                for metric, result in score(answers, questions.rows, questions.metrics).items():
                    scores[questions.key(metric)] = result["score"]
                    scores[f"{questions.key(metric)}_stderr"] = result["stderr"]
        due = control.should_log  # the loss is logged after this, and writing a log resets the flag
        self.trainer.log(scores)
        control.should_log = due

    def _answers(self, rows: list[dict[str, Any]]) -> list[str]:
        accelerator = self.trainer.accelerator
        world = accelerator.num_processes
        share = -(-len(rows) // world)
        # All processes answer equally many rows, some twice, since they gather sharded weights together.
        numbers = [number % len(rows) for number in range(accelerator.process_index, share * world, world)]
        answers = generate_answers(
            self.trainer.model,
            self.processor,
            [rows[number] for number in numbers],
            batch_size=self.settings.batch_size,
            max_new_tokens=self.settings.max_new_tokens,
            system=self.system,
            progress=accelerator.is_main_process and not self.trainer.args.disable_tqdm,
        )
        together = dict(gather_object(list(zip(numbers, answers, strict=True))))
        return [together[number] for number in range(len(rows))]


def scores_of(log: list[dict[str, Any]], sets: list[QuestionSet]) -> list[dict[str, Any]]:
    """Collect the scores of a run for a stage's record.

    Args:
        log: `TrainerState.log_history`, which checkpoints keep.
        sets: the answered sets.
    Returns:
        For each score, in order: step, data, label, metric, score, stderr (None for a single row), n.
    """
    return [
        {
            "step": entry["step"],
            "data": questions.path,
            "label": questions.label,
            "metric": metric,
            "score": entry[questions.key(metric)],
            "stderr": plain(entry[f"{questions.key(metric)}_stderr"]),
            "n": len(questions.rows),
        }
        for entry in log
        for questions in sets
        for metric in questions.metrics
        if questions.key(metric) in entry
    ]
