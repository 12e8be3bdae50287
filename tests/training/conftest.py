"""Tiny backbones with a chat template, pictures and a data set in the LLaVA format."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.vlm.conftest import backbones, seq2seq_backbone  # noqa: F401  # fixtures

COLOURS = ("red", "green", "blue", "white")
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 200, "max_position_embeddings": 12,
}  # fmt: skip


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows about four pictures, one of them text alone."""
    root = tmp_path_factory.mktemp("dataset")
    (root / "images").mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40 + number, 50), colour).save(root / "images" / f"{colour}.png")
    rows: list[dict[str, Any]] = []
    for number in range(11):
        colour = number % 4
        turns = [{"from": "human", "value": f"<image>\nw1 w{number}"}, {"from": "gpt", "value": f"w{40 + colour}"}]
        rows.append({"id": number, "image": f"images/{COLOURS[colour]}.png", "conversations": turns})
    turns = [{"from": "human", "value": "w7 w8"}, {"from": "gpt", "value": "w50"}]
    rows.append({"id": "text-1", "conversations": turns})
    (root / "rows.json").write_text(json.dumps(rows))
    return root / "rows.json"


@pytest.fixture
def values(backbones: tuple[str, str], dataset: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    """A recipe for the first stage that runs in a second."""
    return {
        "stage": "pretrain",
        "output": str(tmp_path / "pretrain"),
        "backbones": {
            "vision": backbones[0],
            "language": backbones[1],
            "qformer": QFORMER,
            "qformer_tokenizer": backbones[1],
            "num_query_tokens": 4,
            "dtype": "float32",
        },
        "adapter": {"bottleneck_dim": 4},
        "data": [{"path": str(dataset)}],
        "training": {
            "batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "logging_steps": 1,
            "save_steps": 3,
            "arguments": {"disable_tqdm": True},
        },
    }


def following(values: dict[str, Any], stage: str, output: Path, **changes: Any) -> dict[str, Any]:
    """The recipe of the next stage, which takes everything else from the directory before it."""
    later = {key: copy.deepcopy(values[key]) for key in ("data", "training")}
    return {**later, "stage": stage, "previous": values["output"], "output": str(output), **changes}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model.safetensors", "adapter_model.safetensors"):
        with safe_open(directory / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    return found
