"""Name emoji with real weights: train on one style, test on new objects and on another vendor's style.

    python -m benchmarks.emoji            # all runs that are not finished; each takes some ten minutes
    python -m benchmarks.emoji --report   # only the table, from the records

Each run trains on captions (the object's kind) with the projection, then on questions about it without the projection
(which keeps training if it is alone), on three quarters of the objects in Google's drawings. A seed determines the
held-out objects, the weights and the order of the data, for all methods alike. Records are written as runs end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import emoji_data as data
from benchmarks.devices import Device, is_gpu
from benchmarks.interleaved import machine, markdown
from benchmarks.pages import rewrite
from examples.easy_vqa.demo import ALIGN_RATES, FINETUNE_RATES, NAMES
from examples.easy_vqa.evaluation import accuracies, answer, spread
from examples.easy_vqa.language import columns, language_kept
from examples.easy_vqa.model import frozen_dtype, load_stage, processor
from examples.easy_vqa.records import write_json
from examples.easy_vqa.training import Stage, train_stage

RESULTS = Path(__file__).parent / "results" / "emoji"
PAGE = Path(__file__).parent.parent / "docs" / "emoji.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.emoji -->", "<!-- end -->"
METHODS = ("crome", "crome-both", "lora", "projection")
SEEDS = 3
ALIGN = Stage("align", steps=120, images_per_step=16, questions_per_image=1, learning_rate=5e-4, word_weight=1.0)
FINETUNE = Stage("finetune", steps=160, images_per_step=16, questions_per_image=1, learning_rate=1e-3)
# Each test set: the vendor, and whether its objects are new.
TESTS = {
    "new objects, Google": ("google", True),
    "same objects, Twitter": ("twitter", False),
    "new objects, Twitter": ("twitter", True),
}
console = Console()


def run_one(
    method: str,
    seed: int,
    directory: Path,
    align: Stage = ALIGN,
    finetune: Stage = FINETUNE,
    limit: int | None = None,
    device: str = "cpu",
    trial: bool = False,
) -> dict[str, Any]:
    """Run both stages, the tests and the measurement on text for one method and seed.

    Args:
        directory: folder of checkpoints; a finished stage is not trained again.
        limit: number of test questions per set; None: all.
        device: device for training and answering.
        trial: whether to hold a quarter of the training objects out once more and test on these, without text.
    """
    shared = processor()
    views = data.features("google", shared.image_processor, data.VIEWS)
    train, held_out = data.split(data.things(), seed)
    if trial:
        train, held_out = data.split(tuple(train), seed)
    align = replace(align, learning_rate=ALIGN_RATES.get(method, align.learning_rate))
    finetune = replace(finetune, learning_rate=FINETUNE_RATES.get(method, finetune.learning_rate))
    record: dict[str, Any] = {"method": method, "seed": seed, "machine": machine(device)}
    record["dtype"] = str(frozen_dtype()).removeprefix("torch.")
    previous = None
    for number, stage in enumerate((align, finetune)):
        rows = data.rows(train, stage.steps * stage.images_per_step, seed + 100 * number, stage.name)
        folder = directory / stage.name
        record[stage.name] = train_stage(
            stage, method, seed, shared, views, folder, previous, rows, use_cpu=not is_gpu(device)
        )
        previous = folder
    model = load_stage(directory / "finetune").to(device)
    drawings = {"google": views[:: data.VIEWS], "twitter": data.features("twitter", shared.image_processor)}
    asked, groups, said = [], [], []
    for name, (vendor, new) in TESTS.items():
        rows = data.questions(held_out if new else train)[:limit]
        asked += rows
        groups += [name] * len(rows)
        said += answer(model, shared, drawings[vendor], rows, description=name)
    guess = [data.most_frequent_kind(train)] * len(asked)
    write_json(directory / "answers.json", [[*row.values(), text] for row, text in zip(asked, said, strict=True)])
    record["score"] = accuracies(tuple(TESTS), groups, asked, said)
    record["most frequent kind"] = accuracies(tuple(TESTS), groups, asked, guess)
    if not trial:
        record["language"] = language_kept(model, shared)
    return record


def file_of(method: str, seed: int, results: Path = RESULTS) -> Path:
    """Return the path of a run's record."""
    return results / f"{method}-seed{seed}.json"


def write_report(results: Path = RESULTS) -> str:
    """Write the table of the existing records and return it; the repository's own table goes into the docs as well."""
    records = [json.loads(file.read_text()) for file in sorted(results.glob("*-seed*.json"))]
    header = ["", "seeds", *TESTS, "text loss, with", "without", "capital of France", "weights"]
    rows = []
    if records:
        by_seed = {record["seed"]: record["most frequent kind"] for record in records}
        guesses = [spread(list(by_seed.values()), name) for name in TESTS]
        rows.append(["most frequent kind", len(by_seed), *guesses, "-", "-", "-", "-"])
    for method in METHODS:
        own = [record for record in records if record["method"] == method]
        if not own:
            continue
        cells = [spread([record["score"] for record in own], name) for name in TESTS]
        cells += columns([record["language"] for record in own])
        rows.append([NAMES[method], len(own), *cells, f"{own[0]['finetune']['trained_parameters']:,}"])
    table = markdown(header, rows)
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(table)
    if results.resolve() == RESULTS.resolve():
        done = f"{len(records)} of {SEEDS * len(METHODS)} runs are done."
        rewrite(PAGE, BEGIN, END, f"{done}\n\n{table}")
    return table


def main(
    report: Annotated[bool, typer.Option("--report", help="Only write the table from the records.")] = False,
    seeds: Annotated[int, typer.Option(help="Seeds per method.")] = SEEDS,
    output: Annotated[Path, typer.Option(help="Checkpoints. A second run continues them.")] = Path("outputs/emoji"),
    results: Annotated[Path, typer.Option(help="Folder for records and table.")] = RESULTS,
    device: Device = "cpu",
) -> None:
    """Run what is not finished: all methods of one seed, then the next seed."""
    for seed, method in [(seed, method) for seed in range(0 if report else seeds) for method in METHODS]:
        file = file_of(method, seed, results)
        if not file.is_file():
            console.print(f"[bold]{NAMES[method]}, seed {seed}[/bold]")
            write_json(file, run_one(method, seed, output / f"{method}-seed{seed}", device=device))
            write_report(results)
    console.print(write_report(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(typer.run(main))
