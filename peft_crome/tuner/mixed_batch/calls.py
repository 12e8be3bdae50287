"""`forward` and `generate` with `adapter_names`: a batch in which each row has its own adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..weights import NAME
from .owners import BASE, Rows, check_count

_LOCK = threading.Lock()  # guards the counts of running calls
# The call that runs in this thread or task, so that a server's requests do not see each other's rows.
_ROWS: ContextVar[Rows | None] = ContextVar("crome_rows", default=None)


@contextmanager
def rows_with_adapters(
    model: nn.Module, names: Sequence[str], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Iterator[None]:
    """Give each row its adapter in calls of `model` while this is open.

    Args:
        model: model with CROME's sites, in eval mode.
        names: an adapter for each row of `input_ids`, or "__base__"; if `generate` repeats rows, for beams or
            several sequences, the adapters are repeated as well.
        arguments, keywords: arguments of the call.
    Raises:
        ValueError: the model is in training mode or merged, an adapter is unknown, or there are more or fewer names
            than rows.
    """
    weights: Any = model._modules[NAME]
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Write model.eval().")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    unknown = sorted(set(names) - {BASE, *weights.crome_up})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {[*weights.crome_up]}."
        )
    ids = keywords.get("input_ids", keywords.get("inputs", arguments[0] if arguments else None))
    ids = ids if isinstance(ids, torch.Tensor) and not ids.is_floating_point() else None
    counted = ids if ids is not None else keywords.get("inputs_embeds")
    if not hasattr(model, "config"):  # a custom module: each input has one row per name
        counted = next((value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)), None)
    if isinstance(counted, torch.Tensor):
        check_count(names, len(counted))
    rows = Rows(model, weights, names, ids, keywords, counted=isinstance(counted, torch.Tensor))
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [
        model.register_forward_pre_hook(_of_this_call(rows, rows.begin), with_kwargs=True),
        model.register_forward_hook(_of_this_call(rows, rows.end)),
        # Modules that train beside an adapter have a copy for each adapter.
        *(m.register_forward_pre_hook(_of_this_call(rows, rows.name_rows), with_kwargs=True) for m in wrappers),
    ]
    token = _ROWS.set(rows)
    with _LOCK:
        running = weights.override = weights.override or _Running()
        running.calls += 1
    try:
        yield
    finally:
        with _LOCK:
            running.calls -= 1
            if not running.calls:  # torch.compile cannot trace a context variable
                weights.override = None
        _ROWS.reset(token)
        for handle in handles:
            handle.remove()


class _Running:
    """The override of the sites while calls with names run, in any thread."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, site: Any, output: Any, site_input: Any) -> Any:
        """Add each row's adapter to a site's output; None if this thread's call has no names."""
        rows = _ROWS.get()
        return None if rows is None or rows.weights is not site._weights[0] else rows.adapt(site, output, site_input)


def _of_this_call(rows: Rows, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a hook so that it ignores passes of other threads and tasks through the same model."""
    return lambda *arguments: hook(*arguments) if _ROWS.get() is rows else None
