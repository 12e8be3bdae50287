"""Write the page's tables and plots from the records that exist. Rows in which nothing was run are left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.interleaved import markdown
from benchmarks.pages import rewrite

from .differences import Difference, paired
from .plan import plan
from .plots import over_examples, over_text
from .runs import LANGUAGE, Kind, Records, Run
from .settings import BASE, Sizes, experiment
from .tasks import TASKS

BEGIN, END = "<!-- begin: written by python -m benchmarks.method_comparison -->", "<!-- end -->"
NOT_RUN = "not run"
DEFAULT = "crome/vision"
SPLITS = {"test": "new images", "shifted": "shifted images"}
CHANGES = {"bfloat16": "bf16", "nf4": "nf4", "int8": "int8", "tuned": "tuned", "tuned, trained again": "trained again"}
LEAST = 2.0  # standard errors of a difference that the page calls a win


def write_report(sizes: Sizes, records: Records, page: Path) -> None:
    """Write the generated part of a page; a page that does not exist is made. Plots go to `images/` beside it."""
    if not page.is_file():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"# Comparison of methods\n\n{BEGIN}\n\n{END}\n", encoding="utf-8")
    rewrite(page, BEGIN, END, Report(sizes, records).text(page.parent / "images"))


class Report:
    """The sections of the page."""

    def __init__(self, sizes: Sizes, records: Records) -> None:
        self.sizes, self.records = sizes, records

    def text(self, images: Path) -> str:
        """Format all sections, and draw the plots. Without records there are neither."""
        runs = plan(self.sizes, self.records)
        done = sum(run in self.records for run in runs)
        if not done:
            return "No run of this comparison has a record yet."
        parts = [f"{done} of {len(runs)} runs are done."]
        for split, title in SPLITS.items():
            parts += [f"### Accuracy on {title}", self.accuracies(split)]
        for split, title in SPLITS.items():
            parts += [f"### The default minus each method, {title}, in points", self.differences(split)]
        parts += ["### Who wins", self.winners(), "### What is lost, and what it costs", self.costs()]
        points = {_title(name): point for name in self.sizes.experiments if (point := self.over_text(name))}
        if points:
            over_text(points, images / "comparison_text.png")
            parts.append("![Accuracy over the loss on text](images/comparison_text.png)")
        for task in self.sizes.example_tasks:
            parts += [f"### Number of training images, {TASKS[task].title}", self.few_examples(task)]
            curves = {_title(name): curve for name in self.sizes.few if len(curve := self.curve(name, task)) > 1}
            if curves:
                over_examples(curves, images / f"comparison_examples_{task}.png")
                parts.append(f"![Accuracy over training images](images/comparison_examples_{task}.png)")
        parts += ["### Tasks one after another", self.sequences(), "### A change underneath", self.changes()]
        for language in self.sizes.other_languages:
            parts += [f"### Another language model, {language}", self.on(language)]
        return "\n\n".join(part.strip() for part in parts)

    def accuracies(self, split: str) -> str:
        """Format accuracy by method and task: the mean over seeds, and the lowest and the highest."""
        words = [self.values("base", BASE, task, "words alone", split) for task in self.sizes.tasks]
        rows = [["words alone, without an image", *map(_percent, words)]]
        for name in (BASE, *self.sizes.experiments):
            own = [self.values(_kind(name), name, task, split, "accuracy") for task in self.sizes.tasks]
            rows.append([_title(name), *map(_percent, own)])
        shift = {task: f" ({TASKS[task].shift})" if split == "shifted" else "" for task in self.sizes.tasks}
        return _table(["", *(TASKS[task].title + shift[task] for task in self.sizes.tasks)], rows)

    def differences(self, split: str) -> str:
        """Format the default's accuracy minus that of each method on the same questions."""
        rows = []
        for name in self.sizes.experiments:
            if name != DEFAULT:
                found = [self.compared(DEFAULT, name, task, split) for task in self.sizes.tasks]
                cells = [
                    NOT_RUN if one is None else f"{100 * one.mean:+.1f} ± {100 * one.stderr:.1f}" for one in found
                ]
                rows.append([_title(name), *cells])
        return _table(["", *(TASKS[task].title for task in self.sizes.tasks)], rows)

    def winners(self) -> str:
        """Format the most accurate method of each task and split, and its lead over the default in standard errors."""
        rows = []
        for task in self.sizes.tasks:
            for split, title in SPLITS.items():
                scores = {
                    name: statistics.mean(values)
                    for name in self.sizes.experiments
                    if (values := self.values("main", name, task, split, "accuracy"))
                }
                if len(scores) < 2:
                    continue
                best = max(scores, key=lambda name: scores[name])
                lead = self.compared(best, DEFAULT, task, split)
                verdict = NOT_RUN
                if best == DEFAULT:
                    verdict = "is the default"
                elif lead is not None:
                    level = "" if lead.in_stderrs >= LEAST else ", level"
                    verdict = f"+{100 * lead.mean:.1f} points, {lead.in_stderrs:.1f} standard errors{level}"
                rows.append([TASKS[task].title, title, _title(best), verdict])
        return _table(["task", "images", "most accurate", "lead over the default"], rows)

    def costs(self) -> str:
        """Format what a method takes from the model, and what it costs."""
        rows = []
        for name in self.sizes.experiments:
            main = self.of("main", name)
            train = [self.records[run]["train_info"] for run in main]
            rows.append(
                [
                    _title(name),
                    self.text_cost(name),
                    self.captions_kept(name),
                    f"{train[0]['num_trainable_params']:,}" if train else NOT_RUN,
                    f"{train[0]['file_size'] / 1e6:.1f}" if train else NOT_RUN,
                    _median([one["cpu_seconds"] / one["settings"]["steps"] for one in train]),
                    _median([one["peak_memory_bytes"] / 2**30 for one in train]),
                    f"{self.records[main[0]]['run_info']['learning_rate']:g}" if main else NOT_RUN,
                ]
            )
        header = ["", "loss on text, nats a token", "captions of other tasks, points", "weights", "MB on disk"]
        return _table([*header, "CPU seconds a step", "peak memory, GiB", "learning rate"], rows)

    def text_cost(self, name: str) -> str:
        """Format what text costs with the method: the first run on the whole text, and the range of all runs."""
        losses = [m["text"] for run in self.of("main", name) if "text" in (m := self.records[run]["metrics"])]
        if not losses:
            return NOT_RUN
        longest = max(losses, key=lambda loss: loss["tokens"])
        costs = [loss["cost"] for loss in losses]
        spread = f", {min(costs):+.3f} to {max(costs):+.3f} in {len(costs)} runs" if len(costs) > 1 else ""
        return f"{longest['cost']:+.3f} ± {longest['cost_stderr']:.3f}{spread}"

    def captions_kept(self, name: str) -> str:
        """Format accuracy on captions of the tasks that were not trained, minus the untrained model's."""
        changes = []
        for run in self.of("main", name):
            for task, score in self.records[run]["metrics"]["captions of other tasks"].items():
                base = self.records.get(Run("base", BASE, task, run.seed))
                if base is not None:
                    changes.append(score["accuracy"] - base["metrics"]["captions"]["accuracy"])
        return f"{100 * statistics.mean(changes):+.1f}" if changes else NOT_RUN

    def over_text(self, name: str) -> tuple[float, float] | None:
        """Return the loss on text and the mean accuracy on all tasks' new images; None if a task was not run."""
        own = [self.values("main", name, task, "test", "accuracy") for task in self.sizes.tasks]
        losses = [m["text"]["cost"] for run in self.of("main", name) if "text" in (m := self.records[run]["metrics"])]
        if not all(own) or not losses:
            return None
        return statistics.mean(losses), statistics.mean(map(statistics.mean, own))

    def few_examples(self, task: str) -> str:
        """Format accuracy by the number of training images."""
        rows = []
        for name in self.sizes.few:
            few = [self.values("examples", name, task, "test", "accuracy", examples=n) for n in self.sizes.examples]
            rows.append([_title(name), *map(_percent, [*few, self.values("main", name, task, "test", "accuracy")])])
        return _table(["", *self.sizes.examples, self.all_images(task)], rows)

    def curve(self, name: str, task: str) -> list[tuple[int, float]]:
        """Return the points of a curve: number of training images, mean accuracy."""
        counts = [*self.sizes.examples, None]
        kinds: list[Kind] = [*("examples" for _ in self.sizes.examples), "main"]
        found = [
            (count or self.all_images(task), self.values(kind, name, task, "test", "accuracy", examples=count))
            for kind, count in zip(kinds, counts, strict=True)
        ]
        return [(count, statistics.mean(values)) for count, values in found if values]

    def all_images(self, task: str) -> int:
        """Return the number of training images of a main run."""
        return self.sizes.steps * self.sizes.images_per_step(TASKS[task].per_step)

    def sequences(self) -> str:
        """Format accuracy after all tasks with one adapter, right after each task, and with an adapter for each."""
        rows = []
        for name in self.sizes.few:
            own = [self.records[run]["metrics"] for run in self.of("sequence", name)]
            alone = [self.values("main", name, task, "test", "accuracy") for task in self.sizes.tasks]
            cells = [
                _percent([statistics.mean(score["accuracy"] for score in metrics[when].values()) for metrics in own])
                for when in ("right after", "at the end")
            ]
            each = _percent([statistics.mean(map(statistics.mean, alone))] if all(alone) else [])
            rows.append([_title(name), *cells, each])
        return _table(["mean over the tasks", "right after each task", "after all tasks", "an adapter for each"], rows)

    def changes(self) -> str:
        """Format accuracy of an adapter on the model that it was trained on, and on changed ones."""
        rows = []
        for trained in self.sizes.frozen:
            for name in self.sizes.few:
                own = [run for run in self.of("change", name) if run.frozen == trained]
                cells = [_percent([self.records[run]["metrics"][to]["accuracy"] for run in own]) for to in CHANGES]
                rows.append([f"{_title(name)}, trained on {CHANGES[trained]}", *cells])
        return _table(["", *CHANGES.values()], rows)

    def on(self, language: str) -> str:
        """Format accuracy on new images with another language model."""
        rows = []
        for name in (BASE, *self.sizes.few):
            own = {run.task: self.metric(run, "test", "accuracy") for run in self.of(_kind(name), name, language)}
            cells = [_percent([own[task]] if task in own else []) for task in self.sizes.sweep_tasks]
            rows.append([_title(name), *cells])
        return _table(["", *(TASKS[task].title for task in self.sizes.sweep_tasks)], rows)

    def of(self, kind: Kind, name: str, language: str = LANGUAGE) -> list[Run]:
        """List the runs of a kind and a method that have records, seed by seed."""
        wanted = (kind, name, language)
        runs = [run for run in plan(self.sizes, self.records) if (run.kind, run.experiment, run.language) == wanted]
        return [run for run in runs if run in self.records]

    def values(self, kind: Kind, name: str, task: str, *keys: str, examples: int | None = None) -> list[Any]:
        """Return a metric of each seed that was run."""
        return [self.metric(run, *keys) for run in self.of(kind, name) if (run.task, run.examples) == (task, examples)]

    def metric(self, run: Run, *keys: str) -> Any:
        """Look a metric up in a record."""
        found = self.records[run]["metrics"]
        for key in keys:
            found = found[key]
        return found

    def compared(self, one: str, other: str, task: str, split: str) -> Difference | None:
        """Compare two methods on the seeds that both have; None without any."""
        by_seed = [
            {run.seed: self.metric(run, split) for run in self.of("main", name) if run.task == task}
            for name in (one, other)
        ]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        return paired(*([scores[seed] for seed in seeds] for scores in by_seed)) if seeds else None


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format a table without the rows in which nothing was run."""
    found = [row for row in rows if set(row[1:]) != {NOT_RUN}]
    return markdown(header, found) if found else "Not run yet."


def _title(name: str) -> str:
    return experiment(name).params.title


def _kind(name: str) -> Kind:
    return "base" if name == BASE else "main"


def _percent(values: Sequence[float]) -> str:
    if not values:
        return NOT_RUN
    spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else NOT_RUN
