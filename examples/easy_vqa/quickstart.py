"""The quick start: align, fine-tune, evaluate, save, reload in a fresh process, draw. Each step is done once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from . import data, report
from .evaluation import answer, score
from .model import attach, blank_features, load_stage, processor, vision_features
from .training import Stage, train_stage, write_json

console = Console()

ALIGN = Stage("align", steps=200, pictures_per_step=16, questions_per_picture=1, learning_rate=1e-3)
FINETUNE = Stage("finetune", steps=200, pictures_per_step=6, questions_per_picture=4, learning_rate=1e-3)
FULL_SAMPLE = {"what": 2000, "yes/no": 1000}
SMALL_SAMPLE = {"what": 500, "yes/no": 250}
RELOAD_SAMPLE = {"what": 48, "yes/no": 16}


def run(output: Path, align: Stage = ALIGN, finetune: Stage = FINETUNE, seed: int = 0) -> list[dict[str, Any]]:
    """Run what is not done yet and return the rows of the table."""
    start = time.perf_counter()
    train, test = data.load_questions("train"), data.load_questions("test")
    shared = processor()
    features = {split: vision_features(split, shared.image_processor) for split in ("train", "test")}

    rows = [{"name": name, "score": score(test, said)} for name, said in data.blind_baselines(train, test).items()]

    def evaluated(name: str, sizes: dict[str, int], model: Callable[[], Any], blank: bool = False) -> dict[str, Any]:
        file = output / f"{name.replace(' ', '-')}.json"
        questions = data.sample(test, sizes)
        if not file.is_file():
            pictures = blank_features(shared.image_processor) if blank else features["test"]
            began = time.perf_counter()
            said = answer(model(), shared, pictures, questions, description=f"answering {name}")
            seconds = round(time.perf_counter() - began, 1)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            write_json(file, {"answers": said, "seconds": seconds, "peak_memory_bytes": memory})
        result = json.loads(file.read_text())
        return {"name": name, "score": score(questions, result["answers"]), **result}

    rows.append(evaluated("before training", SMALL_SAMPLE, lambda: attach("crome", "align")))
    console.print(f"(a) align: projection and adapter learn {align.steps * align.pictures_per_step} captions")
    aligned = train_stage(align, "crome", seed, shared, features["train"], output / "align")
    rows.append(
        {**aligned, **_timed(evaluated("after (a) align", SMALL_SAMPLE, lambda: load_stage(output / "align")))}
    )
    console.print("(b) fine-tune: the adapter alone learns the questions; the projection is frozen now")
    tuned = train_stage(
        finetune, "crome", seed, shared, features["train"], output / "finetune", previous=output / "align"
    )
    final = evaluated("after (b) fine-tune", FULL_SAMPLE, lambda: load_stage(output / "finetune"))
    blind = evaluated("after (b), pictures blanked", SMALL_SAMPLE, lambda: load_stage(output / "finetune"), blank=True)
    rows += [blind, {**tuned, **_timed(final)}]

    reloaded = _reload_in_fresh_process(output, final["answers"])
    report.contact_sheet(data.sample(test, FULL_SAMPLE), final["answers"], output / "contact_sheet.png")
    report.learning_curves(
        {"(a) align, on captions": aligned["losses"], "(b) fine-tune, on questions": tuned["losses"]},
        output / "learning_curves.png",
    )
    write_json(output / "results.json", [{k: v for k, v in row.items() if k != "answers"} for row in rows])
    (output / "results.md").write_text(report.markdown_table(rows))
    report.print_table(rows, "easy-VQA, official test split, free generation")
    console.print(f"Saved, reloaded in a fresh process and asked again: {reloaded} of {reloaded} answers equal.")
    console.print(f"Pictures: {output / 'contact_sheet.png'}, {output / 'learning_curves.png'}")
    console.print(f"This run took {(time.perf_counter() - start) / 60:.1f} minutes.")
    return rows


def answer_again(output: Path, file: Path) -> None:
    """Answer a few test questions with the saved model, and write the answers to `file`."""
    shared = processor()
    questions = _reload_questions()
    features = vision_features("test", shared.image_processor)
    write_json(file, answer(load_stage(output / "finetune"), shared, features, questions, description="reloaded"))


def _reload_questions() -> list[dict[str, Any]]:
    return data.sample(data.sample(data.load_questions("test"), FULL_SAMPLE), RELOAD_SAMPLE)


def _reload_in_fresh_process(output: Path, answers: list[str]) -> int:
    file = output / "reloaded.json"
    command = [sys.executable, "-m", "examples.easy_vqa", "answer-again", str(output), str(file)]
    subprocess.run(command, check=True)
    asked = data.sample(data.load_questions("test"), FULL_SAMPLE)
    first = {(row["question"], row["image_id"]): said for row, said in zip(asked, answers, strict=True)}
    again = json.loads(file.read_text())
    questions = _reload_questions()
    different = [
        (row["question"], row["image_id"], first[row["question"], row["image_id"]], said)
        for row, said in zip(questions, again, strict=True)
        if first[row["question"], row["image_id"]] != said
    ]
    if different:
        raise RuntimeError(f"The reloaded model answers {len(different)} questions differently: {different[:3]}")
    return len(questions)


def _timed(row: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's name, score and answers; time and memory of a trained row are the training's."""
    return {key: row[key] for key in ("name", "score", "answers")}
