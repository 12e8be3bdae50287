"""Which row comes when: a function of the seed and of the number of the draw, and of nothing that happened before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from transformers.trainer_pt_utils import get_length_grouped_indices

from .rows import COUNTS, DRAW, DRAWN

READ_AT_ONCE = 64  # rows of a stream
AT_ONCE = 1 << 16  # of an order's numbers as Python's, which take five times the memory


class Draws(Dataset):
    """Rows by the number of their draw; a negative number, ~n, is draw n once more, which does not count.

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
    """The draws of an epoch: every row once, in an order that follows from seed and epoch.

    The last rows are made up to a `multiple` by rows that do not count. Between processes that have rows left and
    processes that have none, nothing could be exchanged; and rows that came twice would be learned twice.

    Args:
        rows: number of rows.
        seed: of the order; each epoch has another one.
        multiple: rows that all processes take at a time.
        lengths: of the rows, in any unit; rows of about one length come in one batch then. None: as they come.
        batch_size: rows of an optimizer step, over all processes.
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
        """Choose the epoch that is drawn next."""
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
    """Rows of a stream, again and again without an end.

    Each worker of a `DataLoader` reads them all and gives every n-th block, so that the sequence is the same with any
    number of workers; images are opened later, by the worker that has the row.

    Args:
        rows: `datasets.IterableDataset`.
        block: rows that all processes take at a time.
    Attributes:
        done: rows at the beginning of which only `DRAWN` is given, since a run has had them.
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
        # `datasets` holds the epoch in memory that all workers share: one would set another's.
        rows = deepcopy(self.rows)
        for number in count():
            rows.set_epoch(number)
            some = False
            for batch in rows.iter(batch_size=READ_AT_ONCE):  # iter(rows) would divide them by itself
                some = True
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))
            if not some:
                raise ValueError("The streamed data hold no rows.")
