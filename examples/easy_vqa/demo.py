"""The long version: five methods, several seeds, the full test split, and the loss on plain text.

It can be resumed. Results are written as runs finish.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from . import data, language, report
from .evaluation import answer, score, score_yes_no, spread
from .model import METHODS, load_stage, processor, vision_features
from .records import write_json
from .training import Stage, train_stage

console = Console()

ALIGN = Stage("align", steps=200, images_per_step=16, questions_per_image=1, learning_rate=5e-4, word_weight=1.0)
# The model first learns to compare a question with an image, without negation; then negation; then the frequency of
# "yes", which paired questions hide. If a question saw earlier answers, the model would use these and not the image.
FINETUNE = Stage(
    "finetune",
    steps=500,
    images_per_step=6,
    questions_per_image=4,
    learning_rate=1e-3,
    draws=(("affirmative", 120), ("paired", 200), ("any", 180)),
    isolated=True,
)
# LoRA learns best at twice the rate (earlier trials); a projection that starts small would jump at 1e-3.
ALIGN_RATES = {"lora": 1e-3}
FINETUNE_RATES = {"lora": 2e-3, "projection": 3e-4}

NAMES = {
    "crome": "CROME, vision branch alone (the default)",
    "crome-both": "CROME, text and vision branches",
    "lora": "LoRA of equal size",
    "projection": "projection alone, in (a) and (b)",
    "crome-both-4bit": "CROME, both branches, 4-bit language model (nf4)",
}
# Their records precede the measurement on text and do not need it: a projection alone attaches nothing to the
# language model, and the 4-bit rows compare accuracy.
WITHOUT_TEXT = ("projection", "crome-both-4bit")


def run(output: Path, results: Path, seeds: int) -> None:
    """Train and evaluate what is not finished: all methods of one seed, then the next seed."""
    test = data.load_questions("test")
    for seed, method in [(seed, method) for seed in range(seeds) for method in METHODS]:
        file = results / f"{method}-seed{seed}.json"
        if not is_done(file, method):
            console.print(f"[bold]{NAMES[method]}, seed {seed}[/bold]")
            write_json(file, run_one(method, seed, output / f"{method}-seed{seed}", test))
        summarize(results)


def is_done(file: Path, method: str) -> bool:
    """Whether a run's record exists with everything that its method needs."""
    return file.is_file() and (method in WITHOUT_TEXT or "language" in json.loads(file.read_text()))


def run_one(method: str, seed: int, directory: Path, test: list[dict[str, Any]]) -> dict[str, Any]:
    """Run all stages and the full test split for one method and seed."""
    shared = processor()
    train_features, test_features = (vision_features(split, shared.image_processor) for split in ("train", "test"))
    align = replace(ALIGN, learning_rate=ALIGN_RATES.get(method, ALIGN.learning_rate))
    finetune = replace(FINETUNE, learning_rate=FINETUNE_RATES.get(method, FINETUNE.learning_rate))
    aligned = train_stage(align, method, seed, shared, train_features, directory / "align")
    tuned = train_stage(
        finetune, method, seed, shared, train_features, directory / "finetune", previous=directory / "align"
    )
    model = load_stage(directory / "finetune")
    answers = answer(model, shared, test_features, test, description=f"{method} {seed}")
    write_json(directory / "answers.json", answers)
    if method == "crome" and seed == 0:
        report.contact_sheet(test, answers, directory / "contact_sheet.png")
    scores = {"score": score(test, answers), "yes_no": score_yes_no(test, answers)}
    kept = language.language_kept(model, shared)
    return {"method": method, "seed": seed, "align": aligned, "finetune": tuned, **scores, "language": kept}


def summarize(results: Path) -> list[dict[str, Any]]:
    """Write the table (means over seeds, with their spread) and the learning curves from the existing records."""
    records = [json.loads(file.read_text()) for file in sorted(results.glob("*-seed*.json"))]
    baselines = data.blind_baselines(data.load_questions("train"), data.load_questions("test"))
    test = data.load_questions("test")
    lines = [
        "| | seeds | what color / shape | yes/no | text loss, with | without | capital of France "
        "| weights (a) / (b) |",
        "|" + " --- |" * 8,
    ]
    for name, said in baselines.items():
        blind = [score(test, said)]
        lines.append(f"| {name} | - | {spread(blind, 'what')} | {spread(blind, 'yes/no')} |" + " - |" * 4)
    for method in METHODS:
        own = [record for record in records if record["method"] == method]
        if not own:
            continue
        weights = f"{own[0]['align']['trained_parameters']:,} / {own[0]['finetune']['trained_parameters']:,}"
        scores = [record["score"] for record in own]
        cells = [NAMES[method], len(own), spread(scores, "what"), spread(scores, "yes/no")]
        measured = records if method == "projection" else own
        columns = language.base_columns if method == "projection" else language.columns
        cells += [*columns([r["language"] for r in measured if "language" in r]), weights]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"| yes/no questions | {' | '.join(data.YES_NO_GROUPS)} |", "| --- | --- | --- | --- | --- |"]
    for method in METHODS:
        scores = [record["yes_no"] for record in records if record["method"] == method]
        if scores:
            lines.append(f"| {NAMES[method]} | {' | '.join(spread(scores, group) for group in data.YES_NO_GROUPS)} |")
    (results / "table.md").write_text("\n".join(lines) + "\n")
    curves = {f"{record['method']} seed {record['seed']}": record["finetune"]["losses"] for record in records}
    if curves:
        report.learning_curves(curves, results / "learning_curves.png")
    return records
