"""List the runs in the order of their worth, with what each costs, and choose learning rates from the sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from .runs import LANGUAGE, Kind, Records, Run
from .settings import BASE, LADDER, Sizes, experiment, names

FULL = Sizes(
    tasks=("emoji_kinds", "emoji_grids", "easy_vqa", "words", "digits"),
    sweep_tasks=("emoji_kinds", "easy_vqa"),
    example_tasks=("emoji_kinds", "words"),
    experiments=tuple(name for name in names() if name != BASE),
    few=("crome/vision", "crome/text-and-vision", "lora/rank13-q-v", "full-finetuning/projection"),
    seeds=3,
    other_languages=("gemma3",),
    align_steps=300,
    align_images=16,
    steps=60,
    tune_steps=40,
    scale=1.0,
    validation=150,
    test=300,
    kept=30,
    text=24_000,
    book=400_000,
    examples=(16, 64, 256),  # a main run has 960
    frozen=("bfloat16", "nf4"),
    rates=4,
    more_rates=2,
)
# All code paths in about a minute, for tests. The numbers mean nothing.
REDUCED = Sizes(
    tasks=("words", "digits"),
    sweep_tasks=("digits",),
    example_tasks=("digits",),
    experiments=("crome/vision", "lora/rank13-q-v"),
    few=("crome/vision",),
    seeds=1,
    other_languages=(),
    align_steps=2,
    align_images=2,
    steps=2,
    tune_steps=1,
    scale=0.125,
    validation=4,
    test=4,
    kept=2,
    text=2500,
    book=5000,
    examples=(2,),
    frozen=("nf4",),
    rates=2,
    more_rates=0,
)
# Core-seconds on an AMD EPYC with AVX-512 and bfloat16 instructions, one thread.
START = 15.0  # importing and loading
STEP = 1.85  # 16 images with a question each, with another run on the other core
QUESTION = 0.05
CHARACTER = 0.0011  # with the method and without it
SLOWER = {  # guessed for what has no record yet
    "gemma3": 1.2,
    "nf4": 1.1,
    "crome/text": 1.2,
    "crome/text-and-vision": 1.2,
    "ia3/k-v-down": 1.4,
    "ln_tuning/projection-and-norms": 1.35,
    "lora/rank13-q-v": 1.25,
    "lora/rank13-q-v-dora": 1.6,
    "lora/rank2-all-linear": 1.8,
    "prompt_tuning/15-tokens": 1.4,
}


def plan(sizes: Sizes, records: Records) -> list[Run]:
    """List all runs, seed by seed, and the methods of `few` first.

    A sweep has more of them while the best learning rate lies at an end.
    """
    first, few = sizes.sweep_tasks[0], sizes.few
    rest = [name for name in sizes.experiments if name not in few]

    def sweep(language: str, methods: Iterable[str]) -> list[Run]:
        return [
            Run("sweep", name, task, language=language, rate=rate)
            for name in methods
            for rate in rates_to_try(name, language, sizes, records)
            for task in sizes.tasks_of_sweep(language)
        ]

    runs: list[Run] = []
    for seed in range(sizes.seeds):
        runs += [Run("host", seed=seed), *(Run("base", BASE, task, seed) for task in sizes.tasks)]
        for methods in (few, rest):
            runs += sweep(LANGUAGE, methods) if seed == 0 else []
            runs += [Run("main", name, task, seed) for task in sizes.tasks for name in methods]
    runs += [
        *(
            Run("examples", name, task, examples=count)
            for task in sizes.example_tasks
            for count in sizes.examples
            for name in few
        ),
        *(Run("sequence", name) for name in few),
        *(Run("change", name, first, frozen=frozen) for frozen in sizes.frozen for name in few),
    ]
    for other in sizes.other_languages:
        runs += [
            Run("host", language=other),
            *(Run("base", BASE, task, language=other) for task in sizes.sweep_tasks),
            *sweep(other, few),
            *(Run("main", name, task, language=other) for task in sizes.sweep_tasks for name in few),
        ]
    return runs


def needs(run: Run, sizes: Sizes, records: Records) -> list[Run]:
    """List the runs without a record that must end before this one can start."""
    wanted = [] if run.kind == "host" else [Run("host", seed=run.seed, language=run.language)]
    if run.kind not in ("host", "base", "sweep"):
        wanted += [
            Run("sweep", run.experiment, task, language=run.language, rate=rate)
            for rate in rates_to_try(run.experiment, run.language, sizes, records)
            for task in sizes.tasks_of_sweep(run.language)
        ]
    return [one for one in wanted if one not in records]


def rate_of(run: Run, sizes: Sizes, records: Records) -> float:
    """Return a run's learning rate: a sweep's own, else the one that the sweep has chosen, else 0."""
    if run.rate is not None:
        return run.rate
    if run.kind in ("host", "base"):
        return 0.0
    return best_rate(validation_of(run.experiment, run.language, sizes, records))


def rates_to_try(name: str, language: str, sizes: Sizes, records: Records) -> list[float]:
    """List a method's learning rates: its first ones, and those beyond an end as long as the best one lies there."""
    tried = list(experiment(name).params.learning_rates[: sizes.rates])
    for _ in range(sizes.more_rates):
        known = validation_of(name, language, sizes, records)
        if not all(rate in known for rate in tried):
            break
        best = LADDER.index(best_rate({rate: known[rate] for rate in tried}))
        if LADDER[best] == tried[0]:
            tried = [*LADDER[max(0, best - 1) : best], *tried]
        elif LADDER[best] == tried[-1]:
            tried = [*tried, *LADDER[best + 1 : best + 2]]
    return tried


def validation_of(name: str, language: str, sizes: Sizes, records: Records) -> dict[float, float]:
    """Return the mean accuracy on validation rows of each rate that all tasks of the sweep have tried, ascending."""
    found: dict[float, float] = {}
    for rate in LADDER:
        tasks = sizes.tasks_of_sweep(language)
        own = [records.get(Run("sweep", name, task, language=language, rate=rate)) for task in tasks]
        if all(own):
            found[rate] = statistics.mean(record["metrics"]["validation"]["accuracy"] for record in own if record)
    return found


def best_rate(validation: dict[float, float]) -> float:
    """Return the rate with the highest accuracy; the lowest of equals."""
    return max(sorted(validation), key=lambda rate: validation[rate])


def core_minutes(run: Run, sizes: Sizes) -> float:
    """Estimate a run's cost from the seconds of a step, a question and a character."""
    slower = math.prod(SLOWER.get(key, 1.0) for key in (run.language, run.frozen, run.experiment))
    train, test, tasks = sizes.steps * STEP, sizes.test * QUESTION, len(sizes.tasks)
    seconds = (
        START
        + slower
        * {
            "host": sizes.align_steps * STEP,
            "base": 2 * test,
            "sweep": train + sizes.validation * QUESTION,
            "main": train + 2 * test + sizes.kept * (tasks - 1) * QUESTION,
            "examples": train + test,
            "sequence": tasks * (train + 2 * test),
            "change": 2 * train + 5 * test + 5 * START,
        }[run.kind]
    )
    return (seconds + slower * characters(run, sizes) * CHARACTER) / 60


def characters(run: Run, sizes: Sizes) -> int:
    """Return how much text a run measures: a method's first run the whole book, the others less or nothing."""
    if run.kind != "main":
        return 0
    if (run.seed, run.task, run.language) == (0, sizes.tasks[0], LANGUAGE):
        return sizes.book
    return sizes.text if experiment(run.experiment).params.changes_text else 0


def describe(sizes: Sizes, records: Records) -> str:
    """Format the plan: for each kind of run how many there are, are done and are left, and the core-hours."""
    runs = plan(sizes, records)
    lines = [f"{'kind':10}{'runs':>6}{'done':>6}{'left':>6}{'core-hours':>12}{'left':>8}{'measured':>10}"]
    kinds: Iterable[Kind] = dict.fromkeys(run.kind for run in runs)
    totals = [0.0] * 6
    for kind in kinds:
        own = [run for run in runs if run.kind == kind]
        left = [run for run in own if run not in records]
        spent = sum(records[run]["run_info"]["cpu_seconds"] for run in own if run in records) / 3600
        hours = [sum(core_minutes(run, sizes) for run in some) / 60 for some in (own, left)]
        row = [len(own), len(own) - len(left), len(left), *hours, spent]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        lines.append(_line(kind, row))
    return "\n".join([*lines, _line("all", totals)])


def _line(kind: str, row: list[float]) -> str:
    counts, (hours, left, spent) = row[:3], row[3:]
    return f"{kind:10}" + "".join(f"{count:>6.0f}" for count in counts) + f"{hours:>12.1f}{left:>8.1f}{spent:>10.1f}"
