"""Find the embeddings in what a module returns (a tensor, a list, a tuple, a ModelOutput) and keep the container."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import ModelOutput


def map_embeddings(output: Any, hidden_size: int, adapt: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `adapt` to the embeddings in a module's output and keep the container.

    A list or tuple of embeddings (one per image) is adapted whole. In a tuple that carries something else as well,
    only the first element with embeddings is. In a ModelOutput it is `pooler_output`, else `last_hidden_state`.

    Raises:
        ValueError: nothing in `output` has the last axis `hidden_size`.
    """
    if _is_embeddings(output, hidden_size):
        return adapt(output)
    if isinstance(output, ModelOutput):
        for field in ("pooler_output", "last_hidden_state"):
            if holds_embeddings(output.get(field), hidden_size):
                changed = copy.copy(output)
                changed[field] = map_embeddings(output[field], hidden_size, adapt)
                return changed
    elif isinstance(output, (list, tuple)) and holds_embeddings(output, hidden_size):
        items = list(output)
        whole = all(_is_embeddings(item, hidden_size) for item in items)
        first = next(i for i, item in enumerate(items) if holds_embeddings(item, hidden_size))
        for i in range(len(items)) if whole else [first]:
            items[i] = map_embeddings(items[i], hidden_size, adapt)
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    raise ValueError(
        f"A CROME site returned {shape}, expected embeddings of width {hidden_size}. "
        "Name the module that produces them: branches={'vision': ['<module path>']}."
    )


def embeddings_in(output: Any, hidden_size: int) -> list[torch.Tensor]:
    """List the tensors that `map_embeddings` adapts."""
    tensors: list[torch.Tensor] = []
    map_embeddings(output, hidden_size, lambda x: tensors.append(x) or x)  # type: ignore[func-returns-value]
    return tensors


def holds_embeddings(output: Any, hidden_size: int) -> bool:
    """Whether `output` is, or is a list or tuple that contains, a floating tensor with last axis `hidden_size`."""
    if isinstance(output, (list, tuple)):
        return any(holds_embeddings(item, hidden_size) for item in output)
    return _is_embeddings(output, hidden_size)


def _is_embeddings(output: Any, hidden_size: int) -> bool:
    return (
        isinstance(output, torch.Tensor)
        and output.is_floating_point()
        and output.dim() > 0
        and output.shape[-1] == hidden_size
    )
