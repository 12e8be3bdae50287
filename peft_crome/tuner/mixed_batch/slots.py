"""Many adapters in one product: embeddings sorted by adapter into slots of equal room, and stacked maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import nn


class StackedLinear(NamedTuple):
    """A linear map for each slot: (slots, tokens, in) -> (slots, tokens, out).

    Attributes:
        weight: (slots, out, in).
    """

    weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.mT


class Slots(NamedTuple):
    """Where a batch's embeddings stand while their adapters act: each slot has one adapter and the same room.

    There are at most twice as many slots as adapters, and at most about twice as much room as embeddings, however
    unevenly the adapters share the batch.

    Attributes:
        names: adapter of each slot.
        source: (slots, room), the embedding at each place; 0 where a place is empty.
        mine: (n,), the embeddings that have a place.
        place: (n,), their places, counted through all slots.
    """

    names: tuple[str, ...]
    source: torch.Tensor
    mine: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, owners: torch.Tensor, names: dict[int, str], device: torch.device) -> Slots | None:
        """Sort embeddings into slots; None: no embedding belongs to one of these adapters.

        Args:
            owners: (embeddings,), on the CPU: the number of each one's adapter, or -1.
            names: the adapters' names by number.
            device: of the embeddings.
        """
        counts = torch.bincount(owners + 1, minlength=1).tolist()
        present = [number for number in sorted(names) if number + 1 < len(counts) and counts[number + 1]]
        if not present:
            return None
        total = sum(counts[number + 1] for number in present)
        room = -(-total // len(present))
        slots: list[str] = []
        shift = [0] * len(counts)  # by number: from an embedding's rank among the sorted to its place
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
    """The maps of a batch's adapters, put together once for all sites and tokens of a call."""

    def __init__(self) -> None:
        self._made: dict[Any, StackedLinear] = {}

    def maps(self, names: tuple[str, ...], linears: nn.ModuleDict, device: torch.device) -> StackedLinear:
        """The named adapters' maps of one kind.

        Args:
            names: of each slot.
            linears: adapter name -> map. They may differ in the number of hidden features m: zeros fill up to the
                widest, which add nothing.
            device: of the embeddings.
        """
        # Without gradients nothing would lead back to the weights from a stack.
        key = (linears, names, device, torch.is_grad_enabled())
        if key not in self._made:
            self._made[key] = StackedLinear(_stack([_weight(linears[name], device) for name in names]))
        return self._made[key]


def _weight(linear: nn.Module, device: torch.device) -> torch.Tensor:
    with align_module_device(linear):  # accelerate may have offloaded it
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        return weight.to(device)


def _stack(weights: list[torch.Tensor]) -> torch.Tensor:
    """(slots, out, in): one copy, whatever their number."""
    if len(weights) == 1:
        return weights[0][None]
    shapes = [weight.shape for weight in weights]
    if len(set(shapes)) == 1:
        return torch.stack(weights)
    axis = 0 if len({shape[1] for shape in shapes}) == 1 else 1  # the hidden features'
    widest = max(shape[axis] for shape in shapes)
    zeros = weights[0].new_zeros([widest if dim == axis else size for dim, size in enumerate(shapes[0])])
    pieces = [piece for weight in weights for piece in (weight, zeros.narrow(axis, 0, widest - weight.shape[axis]))]
    together = torch.cat(pieces, axis).unflatten(axis, (len(weights), widest))
    return together.movedim(axis, 0)
