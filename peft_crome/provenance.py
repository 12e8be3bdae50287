"""What an adapter was trained on: recorded at attachment, compared when it is loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


def backbone_name(model: nn.Module) -> str:
    """The name or path that a model was loaded from, else its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def describe_backbone(model: nn.Module, hidden_size: int, embedding_rows: torch.Tensor | None) -> dict[str, Any]:
    """Describe a model in a few JSON values.

    Args:
        embedding_rows: rows of the embedding table, (rows, hidden_size), or None where there are no values. Eight
            of them tell two sets of weights apart, whatever they are called and in whichever dtype.
    """
    return {
        "name_or_path": backbone_name(model),
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "hidden_size": hidden_size,
        "embedding_rms": None
        if embedding_rows is None
        else [float(f"{rms:.4g}") for rms in embedding_rows[-8:].square().mean(-1).sqrt()],
    }


def record_backbone(config: Any, here: dict[str, Any]) -> dict[str, Any]:
    """Return what `config.trained_on` becomes on this backbone; warn when it was trained on another one."""
    there = config.trained_on
    if there is None or _same_backbone(there, here):
        return here
    warnings.warn(
        f"This adapter was trained on {there.get('name_or_path')!r} ({there.get('model_type')}) and is loaded onto "
        f"{here['name_or_path']!r} ({here['model_type']}), whose embeddings differ. Its outputs mean nothing there "
        "unless you train it further.",
        stacklevel=6,
    )
    return there if config.inference_mode else here


def _same_backbone(there: dict[str, Any], here: dict[str, Any]) -> bool:
    if (there.get("model_type"), there.get("hidden_size")) != (here["model_type"], here["hidden_size"]):
        return False
    old, new = there.get("embedding_rms"), here["embedding_rms"]
    return not old or not new or all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) for a, b in zip(old, new, strict=False))
