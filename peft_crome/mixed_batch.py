"""A batch in which each row has an adapter of its own: `forward` and `generate` with `adapter_names`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .row_owners import BASE, Rows, check_count

# A host's methods within which its sites are called -> what they read; `generate` repeats rows, `forward` does not.
METHODS = {"get_image_features": "image", "get_video_features": "video", "generate": "generate"}
_LOCK = threading.Lock()


@contextmanager
def rows_with_adapters(
    model: nn.Module, names: Sequence[str], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Iterator[None]:
    """While this is open, a call of `model` gives each row its adapter.

    Args:
        model: with CROME's sites in it, in eval mode.
        names: an adapter for each row of `input_ids`, or "__base__"; where `generate` repeats rows, for beams or
            several sequences, the adapters go with them.
        arguments, keywords: of the call.
    Raises:
        ValueError: the model is in training mode or merged, an adapter is unknown, or there are more or fewer names
            than rows.
    """
    weights: Any = model._modules["crome"]
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Write model.eval().")
    if any(getattr(module, "merged", False) or getattr(module, "_merge_names", ()) for module in model.modules()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    unknown = sorted(set(names) - {BASE, *weights.crome_up})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {[*weights.crome_up]}."
        )
    ids = keywords.get("input_ids", keywords.get("inputs", arguments[0] if arguments else None))
    ids = ids if isinstance(ids, torch.Tensor) and not ids.is_floating_point() else None
    counted = ids if ids is not None else keywords.get("inputs_embeds")
    if not hasattr(model, "config"):  # a module of somebody's own: what it is given has a row for each
        counted = next((value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)), None)
    if isinstance(counted, torch.Tensor):
        check_count(names, len(counted))
    with _LOCK:
        if weights.rows is None:
            weights.rows = _Calls(model)
        weights.rows.enter(Rows(model, weights, names, ids, keywords))
    try:
        yield
    finally:
        with _LOCK:
            if weights.rows.leave():
                weights.rows = None


class _Calls:
    """The calls that run on one model, one in each thread: a server's requests do not see one another's rows.

    While there is one, hooks on the model tell it of each forward pass, and of the methods within which its sites are
    called. Those are in the way of the model's own, so the last call takes them away again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of_thread: dict[int, list[Rows]] = {}
        self.handles = [
            model.register_forward_pre_hook(self._hook("begin"), with_kwargs=True),
            model.register_forward_hook(self._hook("end")),
        ]
        self.methods: list[tuple[dict[str, Any], str]] = []
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # what trains as well has a copy for each adapter
                self.handles.append(module.register_forward_pre_hook(self._hook("name_rows"), with_kwargs=True))
            for name, word in METHODS.items() if isinstance(module, PreTrainedModel) else ():
                if callable(method := getattr(module, name, None)) and name not in module.__dict__:
                    module.__dict__[name] = self._within(method, word)
                    self.methods.append((module.__dict__, name))

    def enter(self, rows: Rows) -> None:
        """This thread's call begins."""
        self.of_thread.setdefault(threading.get_ident(), []).append(rows)

    def leave(self) -> bool:
        """This thread's call ends; whether it was the last one."""
        running = self.of_thread[threading.get_ident()]
        running.pop()
        if not running:
            del self.of_thread[threading.get_ident()]
        if self.of_thread:
            return False
        for handle in self.handles:
            handle.remove()
        for names, name in self.methods:
            names.pop(name, None)
        return True

    def here(self) -> Rows | None:
        """This thread's call."""
        running = self.of_thread.get(threading.get_ident())
        return running[-1] if running else None

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(*arguments: Any) -> Any:
            rows = self.here()
            return None if rows is None else getattr(rows, name)(*arguments)

        return hook

    def _within(self, method: Callable[..., Any], word: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def told(*arguments: Any, **keywords: Any) -> Any:
            rows = self.here()
            if rows is None:
                return method(*arguments, **keywords)
            rows.within.append(word)
            try:
                return method(*arguments, **keywords)
            finally:
                rows.within.pop()

        return told
