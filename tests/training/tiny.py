"""Helpers for tiny stages: recipes and weights."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

COLORS = ("red", "green", "blue", "white")
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 200, "max_position_embeddings": 12,
}  # fmt: skip


def following(values: dict[str, Any], stage: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Return the recipe of the next stage, which takes everything else from the directory before it."""
    later = {key: copy.deepcopy(values[key]) for key in ("data", "training")}
    return {**later, "stage": stage, "previous": values["output"], "output": str(output), **changes}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("model.safetensors", "adapter_model.safetensors"):
        with safe_open(directory / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    return found
