"""Hold more adapters than the device has room for: those used last are on the device, the others are not."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, load_peft_weights
from torch import nn

from .mixed_batch.owners import BASE
from .weights import NAME, CromeWeights

RESTS = ("memory", "disk")


@dataclass
class _Kept:
    """One map of an adapter; it remembers where its weight is while the adapter is not on the device."""

    linear: nn.Module
    device: torch.device
    rest: torch.Tensor
    version: int = -1  # the weight's version when it came to the device

    def come(self) -> None:
        """Copy the weight to the device."""
        weight: Any = self.linear.weight
        weight.data = self.rest.to(self.device, copy=True)
        self.version = weight._version

    def go(self) -> None:
        """Free the device's memory."""
        weight: Any = self.linear.weight
        if weight._version != self.version:  # something has changed it in place: a hot-swap, an optimizer
            self.rest = weight.detach().to("cpu", copy=True)
        weight.data = self.rest


class AdapterPool:
    """Keep the adapters that were used last on the model's device, and the others in memory or on disk.

    All of them are PEFT's adapters: `adapter_names`, `set_adapter`, `delete_adapter` and `save_pretrained` take any of
    them. One that is not on the device still gives the same result, but is copied in every call.

    Attributes:
        hits: adapters that were on the device when a batch asked for them, summed over batches.
        misses: adapters that had to be copied.

    Args:
        model: model on its device, with at least one CROME adapter.
        room: number of the pool's adapters that the device holds; at least as many as one batch names.
        rest: where the other adapters are. "memory": in the CPU's memory. "disk": in their files, which the
            operating system reads when they are needed; do not overwrite these files while the model is in use.
    Raises:
        ValueError: the model has no CROME adapter, or `room` or `rest` is wrong.

    Example:
        >>> pool = AdapterPool(model, room=64)  # doctest: +SKIP
        >>> for name in names:  # doctest: +SKIP
        ...     pool.load_adapter(f"adapters/{name}", name)
        >>> model.generate(**batch, adapter_names=pool.use(["birds", "charts"]))  # doctest: +SKIP
    """

    def __init__(self, model: PeftModel, room: int, rest: str = "memory") -> None:
        weights = model.get_base_model()._modules.get(NAME) if isinstance(model, PeftModel) else None
        if not isinstance(weights, CromeWeights):
            raise ValueError(
                f"{type(model).__name__} has no CROME adapter. Write PeftModel.from_pretrained(...) first."
            )
        if room < 1:
            raise ValueError(f"room={room} is too small. Write at least the number of adapters in one batch.")
        if rest not in RESTS:
            raise ValueError(f"rest={rest!r} is unknown. Write one of {RESTS}.")
        self.model, self.room, self.rest = model, room, rest
        self.hits = self.misses = 0
        self._weights = weights
        self._kept: dict[str, list[_Kept]] = {}
        self._resident: OrderedDict[str, None] = OrderedDict()  # the least recently used comes first
        self._lock = threading.Lock()

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, **kwargs: Any) -> None:
        """Load an adapter with PEFT's `load_adapter`, and keep its weights off the device until a batch names it.

        Args:
            kwargs: as in `PeftModel.load_adapter`.
        Raises:
            ValueError: rest="disk" and the dtype in the file is not the adapter's dtype on the model.
        """
        self.model.load_adapter(str(model_id), adapter_name, **kwargs)
        hub_kwargs, _ = PeftModel._split_kwargs(kwargs)
        # Reading a file for the CPU maps it and copies nothing.
        stored = load_peft_weights(str(model_id), device="cpu", **hub_kwargs) if self.rest == "disk" else {}
        self._put_to_rest(adapter_name, stored)

    def use(self, adapter_names: Sequence[str]) -> list[str]:
        """Bring a batch's adapters to the device, each once, in place of those used longest ago.

        Args:
            adapter_names: the adapter of each row of a batch; "__base__" is a row without an adapter.
        Returns:
            The same names, for `model(..., adapter_names=...)`.
        Raises:
            ValueError: an adapter was not loaded through this pool, or a batch names more adapters than `room`.
        """
        wanted = [name for name in dict.fromkeys(adapter_names) if name != BASE]
        with self._lock, torch.inference_mode(mode=False):
            self._forget_deleted()
            if unknown := [name for name in wanted if name not in self._kept]:
                raise ValueError(f"{unknown}: not in the pool. Write pool.load_adapter(<directory>, {unknown[0]!r}).")
            if len(wanted) > self.room:
                raise ValueError(
                    f"{len(wanted)} adapters are in one batch; the pool holds {self.room}. Write AdapterPool(model, "
                    f"room={len(wanted)}), or smaller batches."
                )
            missing = [name for name in wanted if name not in self._resident]
            self.hits += len(wanted) - len(missing)
            self.misses += len(missing)
            for name in wanted:
                self._resident[name] = None
                self._resident.move_to_end(name)
            while len(self._resident) > self.room:  # make room before copying
                oldest, _ = self._resident.popitem(last=False)
                for kept in self._kept[oldest]:
                    kept.go()
            for name in missing:
                for kept in self._kept[name]:
                    kept.come()
        return list(adapter_names)

    @property
    def names(self) -> list[str]:
        """All adapters of the pool."""
        with self._lock:
            self._forget_deleted()
            return list(self._kept)

    @property
    def resident(self) -> list[str]:
        """The adapters on the device; the least recently used comes first."""
        with self._lock:
            self._forget_deleted()
            return list(self._resident)

    @property
    def hit_rate(self) -> float:
        """Share of the requested adapters that were already on the device; nan before the first batch."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else float("nan")

    def __repr__(self) -> str:
        return (
            f"AdapterPool({len(self.resident)} of {len(self.names)} adapters on the device, room for {self.room}, "
            f"the rest {'in memory' if self.rest == 'memory' else 'on disk'}, hit rate {self.hit_rate:.2f})"
        )

    def _put_to_rest(self, name: str, stored: dict[str, torch.Tensor]) -> None:
        files = {key.split(".")[-2]: tensor for key, tensor in stored.items() if f".{NAME}.crome_" in key}
        devices = {one.linear: one.device for one in self._kept.get(name, ())}  # for an adapter that is loaded again
        kept = []
        for kind, linear in self._weights.linears_of(name).items():
            weight = linear.weight
            rest = files[kind] if files else weight.detach().cpu()
            if rest.dtype != weight.dtype:
                self.model.delete_adapter(name)
                raise ValueError(
                    f"{name!r} is stored in {rest.dtype} and has {weight.dtype} on the model, so its file cannot "
                    "replace it. Write AdapterPool(..., rest='memory')."
                )
            kept.append(_Kept(linear, devices.get(linear, weight.device), rest))
        for one in kept:
            one.linear.weight.data = one.rest
        with self._lock:
            self._kept[name] = kept
            self._resident.pop(name, None)

    def _forget_deleted(self) -> None:
        """Remove adapters from the pool that PEFT's `delete_adapter` removed from the model."""
        for name in [n for n in self._kept if self._weights.crome_up._modules.get(n) is not self._kept[n][0].linear]:
            del self._kept[name]
            self._resident.pop(name, None)
