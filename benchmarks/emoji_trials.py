"""Try other settings of the default on emoji that the benchmark trains on, a quarter of which is held out once more.

    python -m benchmarks.emoji_trials            # all trials that are not finished; each takes some five minutes
    python -m benchmarks.emoji_trials --report   # only the table, from the records

Records are written as trials end.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.emoji import ALIGN, FINETUNE, RESULTS, TESTS, run_one
from benchmarks.interleaved import markdown
from benchmarks.pages import rewrite
from examples.easy_vqa.records import write_json

TRIALS = RESULTS.parent / "emoji_trials"
PAGE = RESULTS.parents[2] / "docs" / "emoji.md"
BEGIN, END = (f"<!-- {word}: written by python -m benchmarks.emoji_trials -->" for word in ("begin", "end"))
SEEDS = 2
# Name: method, and factors of the captions' steps, the questions' steps and the questions' peak rate.
SETTINGS = {
    "the default, as in the benchmark": ("crome", 1, 1, 1),
    "three times the rate": ("crome", 1, 1, 3),
    "twice the width": ("crome-wide", 1, 1, 1),
    "three times the captions": ("crome", 3, 1, 1),
    "three times the questions": ("crome", 1, 3, 1),
    "text and vision branches, as in the benchmark": ("crome-both", 1, 1, 1),
}
console = Console()


def run(name: str, seed: int, directory: Path, limit: int | None = None, scale: float = 1.0) -> dict[str, Any]:
    """Run one trial.

    Args:
        name: a key of `SETTINGS`.
        directory: folder of checkpoints.
        limit: number of questions per set; None: all.
        scale: factor of the steps, for tests.
    """
    method, captions, questions, rate = SETTINGS[name]
    align = replace(ALIGN, steps=math.ceil(captions * ALIGN.steps * scale))
    steps = math.ceil(questions * FINETUNE.steps * scale)
    finetune = replace(FINETUNE, steps=steps, learning_rate=rate * FINETUNE.learning_rate)
    return {"name": name, **run_one(method, seed, directory, align, finetune, limit, trial=True)}


def file_of(name: str, seed: int, results: Path = TRIALS) -> Path:
    """Return the path of a trial's record."""
    return results / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}.json"


def write_report(results: Path = TRIALS) -> str:
    """Write the table of the existing records and return it; the repository's own table goes into the docs as well."""
    records = [json.loads(file.read_text()) for file in sorted(results.glob("*-seed*.json"))]
    rows = []
    for name in SETTINGS:
        own = [record["score"] for record in records if record["name"] == name]
        if own:
            means = [statistics.mean(score[test]["accuracy"] for score in own) for test in TESTS]
            errors = [math.hypot(*(score[test]["stderr"] for score in own)) / len(own) for test in TESTS]
            cells = [f"{mean:.1%} ± {error:.1%}" for mean, error in zip(means, errors, strict=True)]
            rows.append([name, len(own), *cells])
    table = markdown(["", "seeds", *TESTS], rows)
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(table)
    if results.resolve() == TRIALS.resolve():
        rewrite(PAGE, BEGIN, END, f"{len(records)} of {SEEDS * len(SETTINGS)} trials are done.\n\n{table}")
    return table


def main(
    report: Annotated[bool, typer.Option("--report", help="Only write the table from the records.")] = False,
    output: Annotated[Path, typer.Option(help="Checkpoints. A second run continues them.")] = Path(
        "outputs/emoji_trials"
    ),
    results: Annotated[Path, typer.Option(help="Folder for records and table.")] = TRIALS,
) -> None:
    """Run the trials that are not finished: all settings of one seed, then the next seed."""
    for seed, name in [(seed, name) for seed in range(0 if report else SEEDS) for name in SETTINGS]:
        file = file_of(name, seed, results)
        if not file.is_file():
            console.print(f"[bold]{name}, seed {seed}[/bold]")
            write_json(file, run(name, seed, output / file.stem))
            write_report(results)
    console.print(write_report(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(typer.run(main))
