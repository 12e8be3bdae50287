"""Train on two real data sets in one recipe, easy-VQA and digits, from the command line.

    python -m examples.mixture --output outputs/mixture

writes the data as LLaVA files and two recipes, and runs `peft-crome train` and `peft-crome evaluate` on them, each in
a separate process. `pretrain` learns what is shown ("red circle", "seven"), and `finetune` learns questions about it.
Both sets are evaluated before and after each stage. Finished steps are skipped. Needs the extras `train` and `dev`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from examples.easy_vqa import data
from examples.easy_vqa.model import frozen_dtype
from examples.easy_vqa.parts import dinov2_small, easy_vqa_dir, smollm2
from examples.easy_vqa.records import write_json
from examples.easy_vqa.stages import conversation, every, together

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINING_DIGITS = 1400  # of 1,797, which are ordered by the people who wrote them
SETS = ("easy_vqa", "digits")
QUESTION = "Which digit is written here?"


@cache
def digits() -> Any:
    """Load scikit-learn's digits: images, (1797, 8, 8) with values from 0 to 16, and targets, (1797,)."""
    return load_digits()


def digit_image(number: int) -> Image.Image:
    """Draw a digit in white on black, 64 x 64."""
    pixels = digits().images[number]
    image = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
    return image.resize((64, 64), Image.Resampling.BICUBIC)


def write_data(folder: Path, test_rows: int) -> None:
    """Write captions and questions of both sets, and their tests."""
    for split in ("train", "test"):
        questions = data.load_questions(split)
        captions = [(i, [(data.CAPTION_REQUEST, text)]) for i, text in data.captions(questions).items()]
        asked = [(row["image_id"], [(row["question"], row["answer"])]) for row in questions if row["kind"] == "what"]
        asked = every(asked, test_rows) if split == "test" else together(asked)
        write_json(folder / f"easy_vqa-{split}.json", [conversation(n, *row) for n, row in enumerate(asked)])
        write_json(folder / f"easy_vqa-captions-{split}.json", [conversation(n, *r) for n, r in enumerate(captions)])
    written = [(number, WORDS[digit]) for number, digit in enumerate(digits().target)]
    for split, rows in (("train", written[:TRAINING_DIGITS]), ("test", every(written[TRAINING_DIGITS:], test_rows))):
        asked = [(number, [(QUESTION, word)]) for number, word in rows]
        captions = [(number, [(data.CAPTION_REQUEST, word)]) for number, word in rows]
        write_json(folder / f"digits-{split}.json", [conversation(n, *row) for n, row in enumerate(asked)])
        write_json(folder / f"digits-captions-{split}.json", [conversation(n, *r) for n, r in enumerate(captions)])
    (folder / "digits").mkdir(exist_ok=True)
    for number, _ in written:
        digit_image(number).save(folder / "digits" / f"{number}.png")
    (folder / "complete").touch()  # must come last


def recipe(stage: str, output: Path, steps: int, rows: int) -> dict[str, Any]:
    """Build a stage's recipe: both sets, drawn by the square root of their sizes."""
    folder = output / "data"
    images = {"easy_vqa": str(easy_vqa_dir() / "train" / "images"), "digits": str(folder / "digits")}
    captions = "-captions" if stage == "pretrain" else ""
    sets: list[dict[str, Any]] = [
        {"path": str(folder / f"{name}{captions}-train.json"), "images": images[name]} for name in SETS
    ]
    parts = {"vision": str(dinov2_small()), "language": str(smollm2()), "vision_pool_size": 2, "image_size": 112}
    parts["dtype"] = str(frozen_dtype()).removeprefix("torch.")
    return {
        "stage": stage,
        "output": str(output / stage),
        **({"backbones": parts} if stage == "pretrain" else {"previous": str(output / "pretrain")}),
        "data": sets,
        "mixture": {"temperature": 2.0},
        "feature_cache": {"directory": str(output / "features"), "max_gigabytes": 1},
        "system": data.SYSTEM,
        "training": {
            "batch_size": rows,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "initial_learning_rate": 1e-6,
            "warmup_steps": steps // 20,
            "weight_decay": 0.0,
            "save_steps": 50,
        },
    }


def peft_crome(*arguments: str) -> None:
    """Run the command line in a separate process."""
    subprocess.run([sys.executable, "-m", "peft_crome", *arguments], check=True)


def accuracy(output: Path, stage: str, name: str) -> dict[str, float]:
    """Measure exact match of a set's test questions after a stage."""
    from peft_crome.training import exact_match

    answers = output / f"{stage}-on-{name}.jsonl"
    if not answers.is_file():
        folder = output / "data"
        images = easy_vqa_dir() / "test" / "images" if name == "easy_vqa" else folder / "digits"
        test = [str(folder / f"{name}-test.json"), "--images", str(images), "--output", str(answers)]
        peft_crome("evaluate", str(output / stage), *test, "--batch-size", "32", "--max-new-tokens", "8")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    return exact_match([row["answer"] for row in rows], [row["expected"] for row in rows])


def run(output: Path, steps: dict[str, int], rows: int, test_rows: int) -> dict[str, dict[str, dict[str, float]]]:
    """Train and evaluate what is not finished; return accuracy by stage and set."""
    if not (output / "data" / "complete").is_file():
        write_data(output / "data", test_rows)
    results = {}
    for stage, count in steps.items():
        file = output / f"{stage}.yaml"
        file.write_text(yaml.safe_dump(recipe(stage, output, count, rows), sort_keys=False))
        if not (output / stage).is_dir():
            peft_crome("train", str(file))
        results[stage] = {name: accuracy(output, stage, name) for name in SETS}
        write_json(output / "results.json", results)
    return results


def main(
    output: Annotated[Path, typer.Option(help="Folder for all files. A second run continues from it.")] = Path(
        "outputs/mixture"
    ),
    steps: Annotated[int, typer.Option(help="Steps of each stage.")] = 200,
    rows: Annotated[int, typer.Option(help="Rows of a step.")] = 16,
    test_rows: Annotated[int, typer.Option(help="Test rows of each set.")] = 397,
) -> None:
    """Run both stages and print both accuracies after each."""
    for stage, scores in run(output, {"pretrain": steps, "finetune": steps}, rows, test_rows).items():
        said = [f"{name} {s['accuracy']:.1%} ± {s['stderr']:.1%} of {s['n']}" for name, s in scores.items()]
        print(f"after {stage}: {', '.join(said)}")
