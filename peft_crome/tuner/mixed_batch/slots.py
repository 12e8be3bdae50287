"""Compute many adapters in one product: embeddings sorted by adapter into slots of equal size, and stacked maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..maps import StackedLinear


class Slots(NamedTuple):
    """Places of a batch's embeddings while their adapters act. Each slot has one adapter and the same room.

    There are at most twice as many slots as adapters, and at most about twice as much room as embeddings, however
    unevenly the adapters share the batch.

    Attributes:
        names: the adapter of each slot.
        source: (slots, room), the index of the embedding at each place; 0 where a place is empty.
        mine: (n,), indices of the embeddings that have a place.
        place: (n,), their places, numbered through all slots.
    """

    names: tuple[str, ...]
    source: torch.Tensor
    mine: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, owners: torch.Tensor, names: dict[int, str], device: torch.device) -> Slots | None:
        """Sort embeddings into slots. None: no embedding belongs to one of these adapters.

        Args:
            owners: (embeddings,), on the CPU: the number of each embedding's adapter, or -1.
            names: number -> name of each adapter.
            device: device of the embeddings.
        """
        counts = torch.bincount(owners + 1, minlength=1).tolist()
        present = [number for number in sorted(names) if number + 1 < len(counts) and counts[number + 1]]
        if not present:
            return None
        total = sum(counts[number + 1] for number in present)
        room = -(-total // len(present))
        slots: list[str] = []
        shift = [0] * len(counts)  # by number: an embedding's place minus its rank among the sorted
        before = 0
        for number in present:
            shift[number] = len(slots) * room - before
            before += counts[number + 1]
            slots += [names[number]] * -(-counts[number + 1] // room)
        # Embeddings of other groups, or of no adapter, come last.
        last = max(present) + 1
        ours = torch.zeros(len(counts), dtype=torch.bool)
        ours[[number + 1 for number in present]] = True
        mine = torch.where(ours[owners + 1], owners, last).argsort(stable=True)[:total]
        place = torch.arange(total) + torch.tensor(shift)[owners[mine]]
        source = torch.zeros(len(slots) * room, dtype=torch.long)
        source[place] = mine
        return cls(tuple(slots), source.reshape(-1, room).to(device), mine.to(device), place.to(device))


class Stacks:
    """The maps of a batch's adapters, stacked once for all sites and tokens of a call."""

    def __init__(self) -> None:
        self._made: dict[Any, StackedLinear] = {}

    def maps(self, names: tuple[str, ...], linears: nn.ModuleDict, device: torch.device) -> StackedLinear:
        """Stack the named adapters' maps of one kind.

        Args:
            names: the adapter of each slot.
            linears: adapter name -> map. The number of hidden features m may differ: zeros, which add nothing, pad to
                the widest.
            device: device of the embeddings.
        """
        # A stack made without gradients does not lead back to the weights.
        key = (linears, names, device, torch.is_grad_enabled())
        if key not in self._made:
            weight = _stack([_weight(linears[name], device) for name in names])
            self._made[key] = StackedLinear(linears[names[0]], weight)  # type: ignore[arg-type]
        return self._made[key]


def _weight(linear: nn.Module, device: torch.device) -> torch.Tensor:
    with align_module_device(linear):  # accelerate may have offloaded it
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        return weight.to(device)


def _stack(weights: list[torch.Tensor]) -> torch.Tensor:
    """Copy weights into one tensor (slots, out, in), with a single copy for any number of them."""
    if len(weights) == 1:
        return weights[0][None]
    shapes = [weight.shape for weight in weights]
    if len(set(shapes)) == 1:
        return torch.stack(weights)
    axis = 0 if len({shape[1] for shape in shapes}) == 1 else 1  # the axis of the hidden features
    widest = max(shape[axis] for shape in shapes)
    zeros = weights[0].new_zeros([widest if dim == axis else size for dim, size in enumerate(shapes[0])])
    pieces = [piece for weight in weights for piece in (weight, zeros.narrow(axis, 0, widest - weight.shape[axis]))]
    together = torch.cat(pieces, axis).unflatten(axis, (len(weights), widest))
    return together.movedim(axis, 0)
