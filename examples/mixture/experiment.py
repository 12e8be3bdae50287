"""Train on two real data sets in one recipe, easy-VQA and digits, from the command line.

    python -m examples.mixture --output outputs/mixture

writes the data as LLaVA files and two recipes, and runs `peft-crome train` and `peft-crome evaluate` on them, each in
a separate process. `pretrain` learns what is shown ("red circle", "seven"), and `finetune` learns questions about it.
Both sets are evaluated before and after each stage. Finished steps are skipped. Needs the extras `train` and `dev`.
"""

from __future__ import annotations

import os
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
from examples.easy_vqa.parts import easy_vqa_dir
from examples.easy_vqa.records import write_json
from examples.easy_vqa.stages import ask, backbones, conversation, every, peft_crome, together, training_settings

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
    models = {"backbones": backbones() | {"image_size": 112}}
    return {
        "stage": stage,
        "output": str(output / stage),
        **(models if stage == "pretrain" else {"previous": str(output / "pretrain")}),
        "data": sets,
        "mixture": {"temperature": 2.0},
        "feature_cache": {"directory": str(output / "features"), "max_gigabytes": 1},
        "system": data.SYSTEM,
        "training": training_settings(steps, rows),
    }


def ask_set(directory: Path, name: str, folder: Path, answers: Path, *options: str) -> list[dict[str, Any]]:
    """Answer a set's test questions as `stages.ask` does."""
    images = easy_vqa_dir() / "test" / "images" if name == "easy_vqa" else folder / "digits"
    return ask(directory, folder / f"{name}-test.json", images, answers, *options)


def accuracy(output: Path, stage: str, name: str) -> dict[str, float]:
    """Measure exact match of a set's test questions after a stage."""
    from peft_crome.training import exact_match

    rows = ask_set(output / stage, name, output / "data", output / f"{stage}-on-{name}.jsonl")
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
