"""What an adapter's weight file holds, read from its header and checked before a model is touched."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

KEY_PREFIX = "base_model.model.crome."

Shapes = dict[str, tuple[int, ...]]


def read_adapter_shapes(model_id: str, subfolder: str | None = None, **hub_kwargs: Any) -> Shapes | None:
    """Read names and shapes of the CROME tensors in an adapter directory or Hub repository.

    Returns:
        name without the prefix ("crome_up.weight") -> shape; None if there is a configuration on its own.
    Raises:
        ValueError: the file is truncated, not safetensors, holds no CROME weights, or another method's too.
    """
    path = _find(model_id, subfolder, hub_kwargs)
    if path is None:
        return None
    try:
        shapes = _read_shapes(path)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Download or save the adapter again."
        ) from error
    own = ("crome_", "trainable_tokens_")  # rows of trainable_token_indices are saved with any method
    others = tuple(f".{prefix}" for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix not in own)
    foreign = sorted(key for key in shapes if any(prefix in key for prefix in others))
    crome = {key.removeprefix(KEY_PREFIX): shape for key, shape in shapes.items() if key.startswith(KEY_PREFIX)}
    if not crome:
        raise ValueError(
            f"{path} holds no CROME weights: expected keys that start with {KEY_PREFIX!r}, found "
            f"{sorted(shapes)[:3]}. Load it with the PEFT method that wrote it."
        )
    if foreign:
        raise ValueError(
            f"{path} holds unexpected keys of another PEFT method beside CROME's: {foreign[:3]}. Save each adapter in "
            "a directory of its own."
        )
    return crome


def check_shapes(found: Shapes, expected: Shapes, source: str) -> None:
    """Compare an adapter file's tensors with those that the model needs.

    Raises:
        ValueError: lists missing keys, unexpected keys, and tensors of another shape.
    """
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing keys {missing}")
    if unexpected := sorted(set(found) - set(expected)):
        problems.append(f"unexpected keys {unexpected}")
    for key in sorted(set(found) & set(expected)):
        if tuple(found[key]) != tuple(expected[key]):
            problems.append(f"{key} has shape {tuple(found[key])}, this model needs {tuple(expected[key])}")
    if problems:
        raise ValueError(
            f"The adapter file does not fit {source}: {'; '.join(problems)}. "
            "Load it onto the backbone it was trained on, with the adapter_config.json that was saved beside it."
        )


def _read_shapes(path: Path) -> Shapes:
    if path.name == WEIGHTS_NAME:  # a pickle that a user asked PEFT for by name
        return {key: tuple(t.shape) for key, t in torch.load(path, map_location="meta", weights_only=True).items()}
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)


def _find(model_id: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path | None:
    folder = Path(model_id) / (subfolder or "")
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if folder.is_dir():
            if (folder / name).is_file():
                return folder / name
            continue
        try:
            return Path(hf_hub_download(str(model_id), name, subfolder=subfolder, **hub_kwargs))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            continue
    return None
