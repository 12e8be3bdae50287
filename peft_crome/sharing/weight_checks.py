"""Check an adapter's weights: their names, shapes and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES


def expected_shapes(branches: Iterable[str], hidden_size: int, bottleneck_dim: int) -> Shapes:
    """List names and shapes of the 2·branches + 1 tensors of one adapter's file."""
    shapes: Shapes = {"crome_up.weight": (hidden_size, bottleneck_dim)}
    for branch in branches:
        shapes[f"crome_gate_{branch}.weight"] = shapes[f"crome_down_{branch}.weight"] = (bottleneck_dim, hidden_size)
    return shapes


HOST_PREFIX = "base_model.model."


TRAINABLE_TOKENS = "trainable_tokens_"  # rows of trainable_token_indices are saved with any method


EMBEDDINGS = tuple(f"{name}.weight" for name in EMBEDDING_LAYER_NAMES)


# Names that PEFT inserts into a module's path, between the host's names.
WRAPPERS = ("base_layer", "original_module", "token_adapter")


Shapes = dict[str, tuple[int, ...]]


def token_lists(indices: Any) -> list[list[int]]:
    """Return `trainable_token_indices` without the names of their tables, which are paths in an attached adapter."""
    return sorted(map(list, indices.values())) if isinstance(indices, dict) else [list(indices)] if indices else []


def check_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse tensors that no adapter has, on every way of loading: not all ways read a header.

    Args:
        tensors: tensors that PEFT is about to load.
        source: name of the adapter for messages.
    Raises:
        ValueError: there are weights of the host other than embedding tables, or non-finite values; lists them.
    """
    allowed = (".crome_", ".modules_to_save.", TRAINABLE_TOKENS)
    strange = [key for key in tensors if not any(part in f".{key}" for part in allowed)]
    strange = [key for key in strange if not host_path(key).endswith(EMBEDDINGS)]
    if strange:
        raise ValueError(
            f"Weights for {source} are neither CROME's nor of a module in its modules_to_save, and would overwrite "
            f"the model's own: {strange[:3]} ({len(strange)} in all). Load a file that holds the adapter alone."
        )
    wrong = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if wrong:
        raise ValueError(
            f"Weights for {source} hold values that are NaN or infinite, in {sorted(wrong)[:5]}: every output would "
            "be. The training that wrote them diverged, or the file is damaged; take an earlier checkpoint."
        )


def check_shapes(shapes: Shapes, expected: Shapes, source: str) -> None:
    """Compare an adapter file's tensors with those that the model needs.

    Raises:
        ValueError: keys are missing or unexpected, or tensors have another shape; lists them.
    """
    problems = []
    if missing := sorted(set(expected) - set(shapes)):
        problems.append(f"missing keys {missing}")
    if unexpected := sorted(set(shapes) - set(expected)):
        more = f" and {len(unexpected) - 8} more" if len(unexpected) > 8 else ""
        problems.append(f"unexpected keys {unexpected[:8]}{more}")
    for key in sorted(set(shapes) & set(expected)):
        if tuple(shapes[key]) != tuple(expected[key]):
            problems.append(f"{key} has shape {tuple(shapes[key])}, this model needs {tuple(expected[key])}")
    if problems:
        raise ValueError(
            f"The adapter file does not fit {source}: {'; '.join(problems)}. "
            "Load it onto the backbone it was trained on, with the adapter_config.json that was saved beside it."
        )


def host_path(key: str) -> str:
    """Return a module's or tensor's path in the host, without PEFT's names."""
    return ".".join(part for part in key.removeprefix(HOST_PREFIX).split(".") if part not in WRAPPERS)
