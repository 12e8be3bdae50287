"""Run the paper's three stages on real weights: easy-VQA as LLaVA files, recipes as YAML, a fresh process per stage.

    python -m examples.easy_vqa stages --output outputs/three_stages

joins DINOv2-small and SmolLM2-135M (the quick start's parts) by two projections and a small new Q-Former.
`pretrain` learns captions ("red circle"), `instruct` questions on colors and yes/no questions, and `finetune` the
shapes, which `instruct` did not contain. Each stage answers the same test questions before and after. Finished stages
are not trained again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from . import data
from .language import language_kept
from .model import frozen_dtype
from .parts import dinov2_small, easy_vqa_dir, smollm2
from .records import write_json
from .report import print_language

SIZES = {"pretrain": 200, "instruct": 600, "finetune": 100}  # optimizer steps
ROWS = {"pretrain": 16, "instruct": 8, "finetune": 8}  # rows of a step
QFORMER = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768,
    "cross_attention_frequency": 2, "vocab_size": 49_152, "max_position_embeddings": 512,
}  # fmt: skip
KINDS = {"pretrain": "captions", "instruct": "colors and yes/no", "finetune": "shapes"}


def write_data(folder: Path, test_questions: int) -> None:
    """Write easy-VQA in the LLaVA format: a training and a test file per stage."""
    for split in ("train", "test"):
        questions = data.load_questions(split)
        captions = [(i, [(data.CAPTION_REQUEST, text)]) for i, text in data.captions(questions).items()]
        by_kind: dict[str, list[Any]] = {"pretrain": captions, "instruct": [], "finetune": []}
        for row in questions:
            kind = "finetune" if row["answer"] in data.SHAPES else "instruct"
            by_kind[kind].append((row["image_id"], [(row["question"], row["answer"])]))
        for stage, rows in by_kind.items():
            rows = every(rows, test_questions) if split == "test" else together(rows)
            write_json(
                folder / f"{stage}-{split}.json", [conversation(number, *row) for number, row in enumerate(rows)]
            )


def every(rows: list[Any], count: int) -> list[Any]:
    """Pick about `count` rows, evenly spread."""
    return rows[:: max(1, len(rows) // count)][:count]


def together(rows: list[Any]) -> list[Any]:
    """Join up to four questions about one image to one conversation, so that the image is read once."""
    by_image: dict[int, list[Any]] = {}
    for image, turns in rows:
        by_image.setdefault(image, []).extend(turns)
    return [(image, turns[i : i + 4]) for image, turns in by_image.items() for i in range(0, len(turns), 4)]


def conversation(number: int, image: int | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Build a row in the LLaVA format; without an image it is text alone."""
    said = []
    for place, (question, answer) in enumerate(turns):
        question = f"<image>\n{question}" if place == 0 and image is not None else question
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": said} | ({} if image is None else {"image": f"{image}.png"})


def recipe(stage: str, output: Path, folder: Path, steps: int, rows: int, previous: str | None) -> dict[str, Any]:
    """Write a recipe with learning rates for these small models, since the paper's presets are for Vicuna."""
    rates = {"qformer": 1e-4} if stage == "instruct" else {}
    values: dict[str, Any] = {
        "stage": stage,
        "output": str(output / stage),
        "data": [{"path": str(folder / f"{stage}-train.json"), "images": str(easy_vqa_dir() / "train" / "images")}],
        "system": data.SYSTEM,
        "training": training_settings(steps, rows) | {"learning_rates": rates},
    }
    if previous is not None:
        return {**values, "previous": str(output / previous)}
    values["backbones"] = {
        **backbones(),
        "qformer": QFORMER,
        "qformer_tokenizer": str(smollm2()),
        "num_query_tokens": 8,
    }
    return values


def backbones() -> dict[str, Any]:
    """Return the part of a recipe that names the quick start's frozen models."""
    return {
        "vision": str(dinov2_small()),
        "language": str(smollm2()),
        "dtype": str(frozen_dtype()).removeprefix("torch."),
        "vision_pool_size": 2,
    }


def training_settings(steps: int, rows: int) -> dict[str, Any]:
    """Return the part of a recipe that trains these small models."""
    return {
        "batch_size": rows,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "initial_learning_rate": 1e-6,
        "warmup_steps": steps // 20,
        "weight_decay": 0.0,
        "save_steps": 50,
    }


def ask(directory: Path, test: Path, images: Path, answers: Path, *options: str) -> list[dict[str, Any]]:
    """Answer a file of test questions with `peft-crome evaluate`, unless that is done, and return the answered rows.

    Args:
        directory: a stage, a model, or an adapter.
        images: folder of the images.
        answers: JSONL file to write.
        options: further ones of the command line.
    """
    if not answers.is_file():
        files = [str(directory), str(test), "--images", str(images), "--output", str(answers)]
        peft_crome("evaluate", *files, "--batch-size", "32", "--max-new-tokens", "8", *options)
    return [json.loads(line) for line in answers.read_text().splitlines()]


def evaluate(directory: Path, stage: str, folder: Path) -> dict[str, Any]:
    """Compute `scores` of a stage's test questions, answered in a fresh process."""
    answers = directory.parent / f"{directory.name}-on-{stage}.jsonl"
    rows = ask(directory, folder / f"{stage}-test.json", easy_vqa_dir() / "test" / "images", answers)
    return scores([row["answer"] for row in rows], [row["expected"] for row in rows])


def scores(answers: list[str], expected: list[str]) -> dict[str, Any]:
    """Compute exact match of all questions; also of each kind if there are yes/no questions and others."""
    from peft_crome.training import exact_match

    kinds: dict[str, list[tuple[str, str]]] = {}
    for said, wanted in zip(answers, expected, strict=True):
        kinds.setdefault(data.kind_of(wanted), []).append((said, wanted))
    found: dict[str, Any] = exact_match(answers, expected)
    if len(kinds) > 1:
        found["kinds"] = {kind: exact_match(*zip(*pairs, strict=True)) for kind, pairs in sorted(kinds.items())}
    return found


def by_words(stage: str, folder: Path) -> dict[str, Any]:
    """Compute `scores` of the most frequent answer to each question's text, which needs no image."""
    train, test = (
        [
            {"question": ask["value"].removeprefix("<image>\n"), "answer": answer["value"]}
            for row in json.loads((folder / f"{stage}-{split}.json").read_text())
            for ask, answer in zip(row["conversations"][::2], row["conversations"][1::2], strict=True)
        ]
        for split in ("train", "test")
    )
    answers = data.blind_baselines(train, test)["best answer to each question text"]
    return scores(answers, [row["answer"] for row in test])


def untrained(file: Path, stage: str, folder: Path) -> dict[str, Any]:
    """Evaluate the same questions before any training, when there is no directory yet."""
    answers = file.with_name(f"untrained-on-{stage}.json")
    from peft_crome import training
    from peft_crome.data import read_rows

    rows = list(read_rows(folder / f"{stage}-test.json", easy_vqa_dir() / "test" / "images"))
    if not answers.is_file():
        model, processor, _ = training.build(training.load_recipe(file))
        settings = {"system": data.SYSTEM, "batch_size": 32, "max_new_tokens": 8}
        write_json(answers, training.generate_answers(model, processor, rows, **settings))
    return scores(json.loads(answers.read_text()), training.references(rows))


def language(directory: Path, text: str | None) -> dict[str, Any]:
    """Measure `language_kept` of a stage's directory once."""
    from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor

    file = directory.with_name(f"{directory.name}-language.json")
    if not file.is_file():
        model = CromeVLMForConditionalGeneration.from_pretrained(directory)
        write_json(file, language_kept(model, CromeVLMProcessor.from_pretrained(directory), text))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def peft_crome(*arguments: str) -> None:
    """Run the command line in a separate process."""
    subprocess.run([sys.executable, "-m", "peft_crome", *arguments], check=True)


def run(
    output: Path,
    sizes: dict[str, int],
    test_questions: int,
    rows: dict[str, int] = ROWS,
    image_size: int | None = None,
    text: str | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate what is not finished; return one row per stage, with its accuracy before and after.

    Args:
        image_size: size of the images in pixels; None: the tower's.
        text: text to measure the loss on; None: the result of `english_text`.
    """
    folder = output / "data"
    if not (folder / "finetune-test.json").is_file():
        write_data(folder, test_questions)
    results = []
    previous = None
    for stage, steps in sizes.items():
        file = output / f"{stage}.yaml"
        values = recipe(stage, output, folder, steps, rows[stage], previous)
        if image_size is not None and previous is None:
            values["backbones"]["image_size"] = image_size
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        if not (output / stage).is_dir():
            peft_crome("train", str(file))
        record = json.loads((output / stage / "crome_stage.json").read_text())["stages"][-1]
        before = evaluate(output / previous, stage, folder) if previous else untrained(file, stage, folder)
        after = evaluate(output / stage, stage, folder)
        kept = {key: record[key] for key in ("trained", "steps", "seconds")}
        kept["settings"] = settings_of(record["recipe"])
        asked = {"asked": KINDS[stage], "by words alone": by_words(stage, folder), "before": before, "after": after}
        results.append({"stage": stage, **asked, "language": language(output / stage, text), **kept})
        write_json(output / "results.json", results)
        previous = stage
    return results


def settings_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's recipe without values that depend on the machine: names instead of folders."""
    backbones = recipe["backbones"] and {
        key: Path(value).name if key in ("vision", "language", "qformer_tokenizer") else value
        for key, value in recipe["backbones"].items()
    }
    return {"backbones": backbones, "adapter": recipe["adapter"], "training": recipe["training"]}


def report(output: Path, test_questions: int, scale: float) -> None:
    """Run the three stages and print the improvement of each.

    Args:
        output: folder for all files.
        test_questions: number of test questions per stage.
        scale: share of the steps to run.
    """
    sizes = {stage: max(2, round(steps * scale)) for stage, steps in SIZES.items()}
    for row in run(output, sizes, test_questions):
        before = f"{row['before']['accuracy']:.1%} ± {row['before']['stderr']:.1%}"
        after = f"{row['after']['accuracy']:.1%} ± {row['after']['stderr']:.1%} of {row['after']['n']}"
        trained, words = sum(row["trained"].values()), row["by words alone"]
        print(f"{row['stage']}: {row['asked']} {before} -> {after}; {trained:,} weights, {row['steps']} steps")
        print(f"    by words alone, without an image: {words['accuracy']:.1%}")
        for kind, found in row["after"].get("kinds", {}).items():
            alone = words["kinds"][kind]["accuracy"]
            print(f"    {kind}: {found['accuracy']:.1%} of {found['n']} (by words alone {alone:.1%})")
        print_language(row["language"])
