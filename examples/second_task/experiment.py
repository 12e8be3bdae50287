"""Teach a second task to a model with vision; with the adapter off, the model keeps the first task.

    python -m examples.second_task --output outputs/second_task

The model is the quick start's composite (SmolLM2-135M and DINOv2-small). Its projection has learned easy-VQA's
captions and questions and is saved with it. `peft-crome finetune` teaches it handwritten digits. Both tasks and a book
are measured before, and afterwards with the adapter on and off. Finished steps are skipped. Needs the extras `train`
and `dev`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.table import Table

from examples.easy_vqa import data
from examples.easy_vqa.demo import FINETUNE_RATES
from examples.easy_vqa.model import processor, vision_features
from examples.easy_vqa.parts import english_text
from examples.easy_vqa.quickstart import ALIGN, FINETUNE
from examples.easy_vqa.records import write_json
from examples.easy_vqa.stages import peft_crome
from examples.easy_vqa.training import train_stage
from examples.mixture.experiment import ask_set, write_data

TASKS = {"digits": "digits", "easy_vqa": "easy-VQA, what color / what shape"}


def save_model(output: Path, steps: int) -> Path:
    """Save the composite whose projection has learned easy-VQA, so that `AutoModelForImageTextToText` loads it."""
    directory = output / "model-that-sees"
    if not directory.is_dir():
        shared = processor()
        features = vision_features("train", shared.image_processor)
        align = replace(ALIGN, steps=steps)
        finetune = replace(FINETUNE, steps=steps, learning_rate=FINETUNE_RATES["projection"])
        train_stage(align, "projection", 0, shared, features, output / "align")
        train_stage(finetune, "projection", 0, shared, features, output / "first_task", output / "align")
        made = output / "model-that-sees.tmp"
        shutil.copytree(output / "first_task" / "composite", made, dirs_exist_ok=True)
        shared.save_pretrained(made)
        made.rename(directory)
    return directory


def score(model: Path, name: str, output: Path) -> dict[str, float]:
    """Measure exact match on a task's test questions with `peft-crome evaluate`."""
    answers = output / f"{model.name}-on-{name}.jsonl"
    ask_set(model, name, output / "data", answers, "--system", data.SYSTEM)
    scores = json.loads(answers.with_suffix(".scores.json").read_text())["scores"]
    return scores["exact_match"]  # type: ignore[no-any-return]


def text_loss(model: Path, output: Path, text: str) -> dict[str, float]:
    """Measure the loss on a book with `peft-crome evaluate --text`."""
    found = output / f"{model.name}-on-text.json"
    book = output / "book.txt"
    if not found.is_file():
        book.write_text(text, encoding="utf-8")
        peft_crome("evaluate", str(model), "--text", str(book), "--batch-size", "1", "--output", str(found))
    return json.loads(found.read_text())["text_loss"][str(book)]  # type: ignore[no-any-return]


def run(output: Path, steps: int, rows: int, test_rows: int, text: str | None = None) -> dict[str, Any]:
    """Run the unfinished steps.

    Args:
        steps: number of steps of each of the model's two stages, and of the second task.
        rows: number of rows in a step of the second task.
        test_rows: number of test rows of each task.
        text: text to measure the loss on; None: a book.
    Returns:
        Scores of both tasks and the loss on text, for the model and with the adapter.
    """
    if not (output / "data" / "complete").is_file():
        write_data(output / "data", test_rows)
    model, adapter = save_model(output, steps), output / "digits-adapter"
    if not adapter.is_dir():
        settings = {"system": data.SYSTEM, "training.max_steps": steps, "training.batch_size": rows}
        peft_crome(
            "finetune", str(model), str(output / "data" / "digits-train.json"), "--images",
            str(output / "data" / "digits"), "--output", str(adapter),
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        )  # fmt: skip
    scores = {name: {of.name: score(of, name, output) for of in (model, adapter)} for name in TASKS}
    results = {"scores": scores, "text_loss": text_loss(adapter, output, text or english_text())}
    write_json(output / "results.json", results)
    return results


def main(
    output: Annotated[Path, typer.Option(help="Folder for all files. A second run continues from it.")] = Path(
        "outputs/second_task"
    ),
    steps: Annotated[int, typer.Option(help="Steps of each of the two stages, and of the second task.")] = 200,
    rows: Annotated[int, typer.Option(help="Rows of a step of the second task.")] = 16,
    test_rows: Annotated[int, typer.Option(help="Test rows of each task.")] = 397,
) -> None:
    """Run the example and print the table."""
    results = run(output, steps, rows, test_rows)
    table = Table("", "the model", "with the adapter")
    for name, title in TASKS.items():
        cells = (f"{found['score']:.1%} ± {found['stderr']:.1%}" for found in results["scores"][name].values())
        table.add_row(title, *cells)
    loss = results["text_loss"]
    table.add_row("loss on a book, nats a token", f"{loss['base']:.4f}", f"{loss['adapted']:.4f}")
    Console().print(table)
