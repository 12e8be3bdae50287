"""The quick start: align, fine-tune, evaluate with and without images, reload in a fresh process, draw.

Finished steps are not repeated.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import data, report
from .evaluation import answer, score
from .language import language_kept
from .model import attach, blank_features, load_stage, processor, vision_features
from .records import write_json
from .training import Stage, train_stage

console = Console()

ALIGN = Stage("align", steps=200, images_per_step=16, questions_per_image=1, learning_rate=1e-3)
FINETUNE = Stage("finetune", steps=200, images_per_step=6, questions_per_image=4, learning_rate=1e-3)
LARGE_SAMPLE = {"what": 600, "yes/no": 300}  # test questions for the result
SMALL_SAMPLE = {"what": 100, "yes/no": 50}  # for the models that the result is compared with
RELOADED = 64  # questions asked again in a fresh process: one batch


def run(
    output: Path,
    align: Stage = ALIGN,
    finetune: Stage = FINETUNE,
    seed: int = 0,
    large: dict[str, int] = LARGE_SAMPLE,
    small: dict[str, int] = SMALL_SAMPLE,
    text: str | None = None,
) -> list[dict[str, Any]]:
    """Run the unfinished steps and return the rows of the table.

    Args:
        output: directory of checkpoints, answers, table and images.
        align, finetune: the two stages.
        seed: seed of the adapter's weights and of the order of the data.
        large, small: test questions per kind, for the final model and for the models that it is compared with.
        text: text to measure the loss on; None: the result of `english_text`.
    """
    start = time.perf_counter()
    train, test = data.load_questions("train"), data.load_questions("test")
    shared = processor()
    console.print("Before training: the tower reads all images, once; then the model answers")
    features = {split: vision_features(split, shared.image_processor) for split in ("train", "test")}

    rows = [{"name": name, "score": score(test, said)} for name, said in data.blind_baselines(train, test).items()]

    def evaluated(name: str, sizes: dict[str, int], model: Callable[[], Any], blank: bool = False) -> dict[str, Any]:
        file = output / f"{name.replace(' ', '-')}.json"
        questions = data.sample(test, sizes)
        if not file.is_file():
            images = blank_features(shared.image_processor) if blank else features["test"]
            began = time.perf_counter()
            said = answer(model(), shared, images, questions, description=f"answering {name}")
            seconds = round(time.perf_counter() - began, 1)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            write_json(file, {"answers": said, "answering_seconds": seconds, "peak_memory_bytes": memory})
        result = json.loads(file.read_text())
        return {"name": name, "score": score(questions, result["answers"]), **result}

    rows.append(evaluated("before training", small, lambda: attach("crome", "align")))
    console.print(f"(a) align: projection and adapter learn {align.steps * align.images_per_step} captions")
    aligned = train_stage(align, "crome", seed, shared, features["train"], output / "align")
    rows.append({**aligned, **_timed(evaluated("after (a) align", small, lambda: load_stage(output / "align")))})
    console.print("(b) fine-tune: the adapter alone learns the questions; the projection is frozen now")
    tuned = train_stage(
        finetune, "crome", seed, shared, features["train"], output / "finetune", previous=output / "align"
    )
    final = evaluated("after (b) fine-tune", large, lambda: load_stage(output / "finetune"))
    blind = evaluated("after (b), images blanked", small, lambda: load_stage(output / "finetune"), blank=True)
    rows += [blind, {**tuned, **_timed(final)}]

    console.print("Without an image: the loss on a book and a question, with the adapter and without")
    kept = _language(output, shared, text)
    rows[-1]["language"] = kept

    asked = data.sample(test, large)
    reloaded = _ask_again_in_fresh_process(output, asked, final["answers"])
    report.contact_sheet(asked, final["answers"], output / "contact_sheet.png")
    report.learning_curves(
        {"(a) align, on captions": aligned["losses"], "(b) fine-tune, on questions": tuned["losses"]},
        output / "learning_curves.png",
    )
    write_json(output / "results.json", [{k: v for k, v in row.items() if k != "answers"} for row in rows])
    (output / "results.md").write_text(report.markdown_table(rows))
    report.print_table(rows, "easy-VQA, official test split, free generation")
    report.print_language(kept)
    console.print(f"Saved, reloaded in a fresh process and asked again: {reloaded} of {reloaded} answers equal.")
    console.print(f"Images: {output / 'contact_sheet.png'}, {output / 'learning_curves.png'}")
    console.print(f"This run took {(time.perf_counter() - start) / 60:.1f} minutes.")
    return rows


def _language(output: Path, shared: Any, text: str | None) -> dict[str, Any]:
    file = output / "language.json"
    if not file.is_file():
        write_json(file, language_kept(load_stage(output / "finetune"), shared, text))
    return json.loads(file.read_text())


def answer_again(output: Path) -> None:
    """Answer the questions of `again.json` with the saved model, and write the answers beside it."""
    shared = processor()
    questions = json.loads((output / "again.json").read_text())
    features = vision_features("test", shared.image_processor)
    answers = answer(load_stage(output / "finetune"), shared, features, questions, description="answering again")
    write_json(output / "answered-again.json", answers)


def _ask_again_in_fresh_process(output: Path, questions: list[dict[str, Any]], answers: list[str]) -> int:
    # The whole first batch on equally many threads, since bf16 would round differently otherwise.
    order = sorted(range(len(questions)), key=lambda i: questions[i]["image_id"])[:RELOADED]
    chosen, first = [questions[i] for i in order], [answers[i] for i in order]
    write_json(output / "again.json", chosen)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "examples.easy_vqa", "answer-again", str(output)]
    subprocess.run(command, check=True, env=environment)
    again = json.loads((output / "answered-again.json").read_text())
    different = [(row, a, b) for row, a, b in zip(chosen, first, again, strict=True) if a != b]
    if different:
        raise RuntimeError(f"The reloaded model answers {len(different)} questions differently: {different[:3]}")
    return len(chosen)


def _timed(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the memory of an evaluation: the memory in a trained row is that of the training."""
    return {key: row[key] for key in ("name", "score", "answers", "answering_seconds")}
