"""Decide which row comes when, from the seed and the number of the draw only, and never from earlier draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from transformers.trainer_pt_utils import get_length_grouped_indices

from .rows import COUNTS, DRAW, DRAWN

READ_AT_ONCE = 64  # rows of a stream read at once
AT_ONCE = 1 << 16  # numbers made Python ints at once, which take five times the memory


class Draws(Dataset):
    """Get rows by the number of their draw. A negative number, ~n, repeats draw n without counting it.

    Args:
        rows: the data set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        draw = number if number >= 0 else ~number
        return {**self.rows[draw % len(self.rows)], DRAW: draw, COUNTS: number >= 0}


class DrawOrder(Sampler[int]):
    """Order the draws of an epoch: every row once, in an order that follows from seed and epoch.

    The order is padded to a `multiple` by rows that do not count. Otherwise some processes would run out of rows and
    the others would wait for them; and rows that came twice would be learned twice.

    Args:
        rows: number of rows.
        seed: seed of the order, which differs in each epoch.
        multiple: number of rows that all processes take at a time.
        lengths: lengths of the rows in any unit, to batch rows of about one length; None: random batches.
        batch_size: number of rows of an optimizer step, over all processes.
    """

    def __init__(
        self, rows: int, *, seed: int, multiple: int, batch_size: int, lengths: Sequence[int] | None = None
    ) -> None:
        self.rows = rows
        self.seed = seed
        self.multiple = multiple
        self.batch_size = batch_size
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch to draw next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + -self.rows % self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=generator)
        else:
            order = torch.tensor(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
        first = self.epoch * self.rows
        for part in order.split(AT_ONCE):
            for row in part.tolist():
                yield first + row
        for number in range(-self.rows % self.multiple):
            yield ~(first + int(order[number % self.rows]))


class DrawStream(IterableDataset):
    """Repeat the rows of a stream forever.

    Each worker of a `DataLoader` reads all rows and yields every n-th block, so that any number of workers gives the
    same sequence. The worker that has a row opens its images later.

    Args:
        rows: `datasets.IterableDataset`.
        block: number of rows that all processes take at a time.
    Attributes:
        done: number of rows that a run has already had. They come as `DRAWN` alone.
    """

    def __init__(self, rows: Any, block: int) -> None:
        self.rows = rows
        self.block = block
        self.done = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for draw, row in enumerate(self._passes()):
            if draw // self.block % shares == share:
                yield {**row, DRAW: draw, COUNTS: True} if draw >= self.done else {DRAWN: True}

    def _passes(self) -> Iterator[dict[str, Any]]:
        # `datasets` holds the epoch in memory that all workers share, so one would set another's.
        rows = deepcopy(self.rows)
        for number in count():
            rows.set_epoch(number)
            some = False
            for batch in rows.iter(batch_size=READ_AT_ONCE):  # iter(rows) would split them between workers
                some = True
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))
            if not some:
                raise ValueError("The streamed data hold no rows.")
