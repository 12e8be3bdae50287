"""Test that two commands train a model of each family on a task and score it, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from peft_crome.data import open_image, read_rows

from . import FAMILIES, Family

TRAINED = [family for family in FAMILIES.values() if family.trains.startswith("yes")]
COLORS = ("red", "blue", "green", "white")


FORMS = ("llava.json", "messages.jsonl", "table.parquet")
COLUMNS = {"question": "question", "answer": "answer", "image": "image", "id": "id"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six rows in each of three forms: five squares with their colors, and one row of text. Return the
    folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").mkdir()
    llava: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for number, color in enumerate([*COLORS, "red", None]):
        asked, answer = ("What color?", color) if color else ("What is two?", "A number.")
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        content: list[dict[str, Any]] = [{"type": "text", "text": asked}]
        row = {"id": f"r{number}"}
        cell = None
        if color:
            photo = folder / "photos" / f"{number}.png"
            Image.new("RGB", (60 + 20 * number, 90), color).save(photo)
            turns[0]["value"] = f"<image>\n{asked}"
            content.insert(0, {"type": "image", "image": photo.name})
            llava.append({**row, "image": photo.name, "conversations": turns})
            cell = {"bytes": photo.read_bytes(), "path": None}
        else:
            llava.append({**row, "conversations": turns})
        said = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        messages.append({**row, "messages": said})
        table.append({**row, "image": cell, "question": asked, "answer": answer})
    (folder / FORMS[0]).write_text(json.dumps(llava))
    (folder / FORMS[1]).write_text("".join(json.dumps(row) + "\n" for row in messages))
    Dataset.from_list(table).to_parquet(folder / FORMS[2])
    return folder


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_three_forms_are_the_same_rows(form: str, data: Path) -> None:
    expected, rows = (
        [*read_rows(data / file, data / "photos", columns=COLUMNS if "table" in file else None)]
        for file in (FORMS[0], form)
    )
    for row, same in zip(rows, expected, strict=True):
        assert (row["id"], row["messages"]) == (same["id"], same["messages"])
        pixels = [[open_image(image, "a row").tobytes() for image in one["images"]] for one in (row, same)]
        assert pixels[0] == pixels[1]


def named_columns(file: Path) -> list[str]:
    """Return the command-line options that name the columns of a table."""
    return [word for name in COLUMNS if "table" in file.name for word in ("--column", f"{name}={name}")]


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "peft_crome", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)
@pytest.mark.slow
def test_two_lines(family: Family, family_checkpoint: Callable[[Family], Path], data: Path, tmp_path: Path) -> None:
    """A model trains on rows of one form and is scored on rows of the next. The three forms alternate over the
    families."""
    place = TRAINED.index(family)
    trained, tested = (data / FORMS[(place + later) % len(FORMS)] for later in range(2))
    model, output = family_checkpoint(family), tmp_path / "adapter"
    steps = ["training.max_steps=2", "training.batch_size=3", "training.warmup_steps=1", "training.save_steps=1"]
    if not family.chat_template:
        steps.append("chat_template=words")
    made = run(
        "finetune", model, trained, "--images", data / "photos", "--output", output,
        *named_columns(trained), *(word for step in steps for word in ("--set", step)), folder=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    weights = load_file(output / "adapter_model.safetensors")
    up = next(value for key, value in weights.items() if "crome_up" in key)
    assert torch.isfinite(up).all()
    assert up.abs().sum() > 0
    record = json.loads((output / "crome_stage.json").read_text())
    assert record["stages"][-1]["recipe"]["model"]["name"] == str(model)
    assert "import peft_crome" in (output / "README.md").read_text()
    saved, original = (tf.AutoProcessor.from_pretrained(folder) for folder in (output, model))
    assert type(saved) is type(original)
    published = original.chat_template or original.tokenizer.chat_template
    assert (saved.chat_template or saved.tokenizer.chat_template) == published or not family.chat_template
    scored = run(
        "evaluate", output, tested, "--images", data / "photos", "--max-new-tokens", "2",
        *named_columns(tested),
        "--output", tmp_path / "answers.jsonl", folder=tmp_path,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
