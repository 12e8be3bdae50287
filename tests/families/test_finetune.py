"""Two lines teach a model of each family a task, and score it: from the command line, in fresh processes."""

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
from PIL import Image
from safetensors.torch import load_file

from . import FAMILIES, Family

TEMPLATED = [family for family in FAMILIES.values() if family.chat_template]
COLORS = ("red", "blue", "green", "white")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows in LLaVA's form: squares and their colors, and one row of text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(5):
        color = COLORS[number % len(COLORS)]
        Image.new("RGB", (60 + 20 * number, 90), color).save(folder / "photos" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": color}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    said = [{"from": "human", "value": "What is two?"}, {"from": "gpt", "value": "A number."}]
    rows.append({"id": "text", "conversations": said})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "peft_crome", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("family", TEMPLATED, ids=lambda family: family.name)
@pytest.mark.slow
def test_two_lines(family: Family, family_checkpoint: Callable[[Family], Path], data: Path, tmp_path: Path) -> None:
    model, output = family_checkpoint(family), tmp_path / "adapter"
    steps = ["training.max_steps=2", "training.batch_size=3", "training.warmup_steps=1", "training.save_steps=1"]
    made = run(
        "finetune", model, data / "data.json", "--images", data / "photos", "--output", output,
        *(word for step in steps for word in ("--set", step)), folder=tmp_path,
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
    assert (saved.chat_template or saved.tokenizer.chat_template) == (
        original.chat_template or original.tokenizer.chat_template
    )
    scored = run(
        "evaluate", output, data / "data.json", "--images", data / "photos", "--max-new-tokens", "2",
        "--output", tmp_path / "answers.jsonl", folder=tmp_path,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
