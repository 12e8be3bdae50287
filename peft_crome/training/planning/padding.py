"""Estimate how much of a batch is padding, and what grouping and packing would save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from ...backbone.packed_rows import Bins, area, best_fit, fullest


@dataclass(frozen=True)
class Padding:
    """Shares of a batch's tokens that are padding.

    Attributes:
        random: in batches of random rows.
        grouped: with `training.group_by_length`.
        packed: with `training.packing`.
    """

    random: float
    grouped: float
    packed: float


def padding_of(
    lengths: Sequence[int], rows: int, *, step: int, max_length: int | None, total: int = 0, flash: bool = False
) -> Padding:
    """Estimate the padding of batches from the lengths of a sample of rows.

    Args:
        lengths: tokens of each row, after a cut.
        rows: rows of a forward pass.
        step: rows of an optimizer step, which `group_by_length` chooses by their length.
        max_length: as in `pack_rows`.
        total: rows of the whole data, if the sample has fewer. transformers groups up to 50 steps of them at once.
        flash: flash attention packs a batch into one row.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    steps = max(1, min(max(total, len(lengths)) // (4 * step), 50))
    grouped = get_length_grouped_indices(lengths, step, mega_batch_mult=steps, generator=generator)
    batches = _batches(lengths, order, rows)
    packed = [[[*range(len(batch))]] if flash else fullest(batch, max_length, best_fit) for batch in batches]
    return Padding(
        _share((batch, _alone(batch)) for batch in batches),
        _share((batch, _alone(batch)) for batch in _batches(lengths, grouped, rows)),
        _share(zip(batches, packed, strict=True)),
    )


def _batches(lengths: Sequence[int], order: Sequence[int], rows: int) -> list[list[int]]:
    rows = min(rows, len(order))
    return [[lengths[row] for row in order[first : first + rows]] for first in range(0, len(order) - rows + 1, rows)]


def _alone(batch: Sequence[int]) -> Bins:
    return [[row] for row in range(len(batch))]


def _share(batches: Iterable[tuple[Sequence[int], Bins]]) -> float:
    sizes = [(sum(batch), area(batch, bins)) for batch, bins in batches]
    return 1 - sum(used for used, _ in sizes) / sum(whole for _, whole in sizes)
