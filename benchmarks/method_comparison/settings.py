"""Read the configurations of the compared methods, and name the sizes of the comparison."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict

import peft_crome  # noqa: F401  # registers CROME with PEFT

from .runs import LANGUAGE

FOLDER = Path(__file__).parent
EXPERIMENTS = FOLDER / "experiments"
DEFAULTS = FOLDER / "default_training_params.json"
ADAPTER, TRAINING = "adapter_config.json", "training_params.json"
BASE = "base/untrained"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # learning rates that a sweep may try


class TrainingParams(BaseModel):
    """Values of `default_training_params.json` that a `training_params.json` may replace.

    Attributes:
        title: name in tables.
        learning_rates: the sweep's first rates, each from `LADDER`, in ascending order.
        trains: ends of the names of the parameters that train, in a method without an adapter configuration.
        soft_tokens: ids of unused tokens that come before each prompt with an image.
        changes_text: whether a prompt without an image can meet what trains.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    learning_rates: tuple[float, ...]
    trains: tuple[str, ...]
    soft_tokens: tuple[int, ...]
    changes_text: bool


class Experiment(BaseModel):
    """One method with its settings: a directory of `experiments/`, laid out as in PEFT's `method_comparison`."""

    model_config = ConfigDict(frozen=True)

    name: str
    params: TrainingParams
    adapter: dict[str, Any] | None

    def peft_config(self) -> PeftConfig | None:
        """Build the configuration; None without an adapter."""
        return None if self.adapter is None else PeftConfig.from_pretrained(str(EXPERIMENTS / self.name))


class Sizes(BaseModel):
    """What is run, and how much of it.

    Attributes:
        tasks: names of tasks, in the order in which a sequence learns them.
        sweep_tasks: tasks on whose validation rows a learning rate is chosen.
        example_tasks: tasks of the measurement of how little data is enough.
        experiments: names of the compared methods.
        few: methods of the further measurements: number of examples, tasks in sequence, a change underneath.
        seeds: number of seeds of the main table. Other measurements have one.
        other_languages: language models on which the methods of `few` learn the sweep's tasks, with one seed.
        align_steps, steps, tune_steps: optimizer steps of a host, of a method, and of the language model that changes.
        align_images: captioned images of a step of a host.
        scale: factor of a task's images per step.
        validation, test, kept: questions of each kind of evaluation. A task may have fewer.
        text: characters of English prose on which runs are measured, a method that leaves text alone in one run.
        book: the same for each method's first run.
        examples: numbers of training images in the measurement of how little data is enough.
        frozen: how the language model is frozen where an adapter learns that then moves.
        rates: how many of a method's learning rates a sweep tries; more_rates: how many further ones it may add while
            the best one lies at an end.
    """

    model_config = ConfigDict(frozen=True)

    tasks: tuple[str, ...]
    sweep_tasks: tuple[str, ...]
    example_tasks: tuple[str, ...]
    experiments: tuple[str, ...]
    few: tuple[str, ...]
    seeds: int
    other_languages: tuple[str, ...]
    align_steps: int
    align_images: int
    steps: int
    tune_steps: int
    scale: float
    validation: int
    test: int
    kept: int
    text: int
    book: int
    examples: tuple[int, ...]
    frozen: tuple[str, ...]
    rates: int
    more_rates: int

    def tasks_of_sweep(self, language: str) -> tuple[str, ...]:
        """Return the tasks that choose a learning rate: the first alone on another language model."""
        return self.sweep_tasks if language == LANGUAGE else self.sweep_tasks[:1]

    def images_per_step(self, full: int) -> int:
        """Return the images of a step of a task that has `full` of them at full size."""
        return max(1, round(full * self.scale))


@cache
def experiment(name: str) -> Experiment:
    """Read a method's directory.

    Args:
        name: "<method>/<experiment>".
    Raises:
        ValueError: the directory has neither file.
    """
    folder = EXPERIMENTS / name
    files = {kind: folder / kind for kind in (ADAPTER, TRAINING)}
    if not any(file.is_file() for file in files.values()):
        raise ValueError(f"No experiment {name!r}. Known: {', '.join(names())}.")
    own = {kind: json.loads(file.read_text()) for kind, file in files.items() if file.is_file()}
    params = json.loads(DEFAULTS.read_text()) | {"title": name} | own.get(TRAINING, {})
    return Experiment(name=name, params=TrainingParams(**params), adapter=own.get(ADAPTER))


def names() -> list[str]:
    """List the directories of all methods."""
    found = {file.parent for kind in (ADAPTER, TRAINING) for file in EXPERIMENTS.glob(f"*/*/{kind}")}
    return sorted(str(folder.relative_to(EXPERIMENTS)) for folder in found)
