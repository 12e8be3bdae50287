"""Order the rows of a batch so that neighbors fill packed rows, which keep the order of their images."""

from __future__ import annotations

from typing import Any

import torch

from ..backbone.packed_rows import best_fit, fullest
from .collator import ConversationCollator
from .rows import DRAWN


class PackingOrder:
    """Wrap a collator so that `pack_rows` finds conversations beside each other that fill a row.

    Args:
        collator: collator whose rows have at most `max_length` tokens; they are counted by the headers of their files.
    """

    def __init__(self, collator: ConversationCollator) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if DRAWN in rows[0]:  # a run that is resumed skips them
            return self.collator(rows)
        lengths = [size.kept for size in self.collator.measure(rows) if not isinstance(size, ValueError)]
        if len(lengths) < len(rows):
            return self.collator(rows)  # which raises the error of a row
        bins = fullest(lengths, self.collator.max_length, best_fit)
        return self.collator([rows[number] for numbers in bins for number in numbers])
