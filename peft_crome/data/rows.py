"""Define a row of training data, independent of its format, and its possible faults."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..utils.shorten import short

FAULTS = {
    "json": "not JSON",
    "row": "not a row with a conversation",
    "turn": "a turn that cannot be read",
    "order": "roles out of order",
    "empty": "an empty turn",
    "answer": "no answer to learn from",
    "template": "a conversation that the chat template does not take",
    "placeholder": "wrong number of <image>, <video> or <audio>",
    "path": "a path that is none, or leaves the folder of images",
    "missing": "a missing image, video or sound",
    "unreadable": "an unreadable image, video or sound",
    "host": "an image, video or sound that the model does not take",
    "duplicate": "the same conversation about the same images once more",
    "long": "longer than the model takes, so that no image or no answer is whole",
    "cut": "an answer that is cut off at the end",
}

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
FORM = 4  # version of stored rows; raise it when `parse` changes, or `datasets` serves old rows

# Keys that `draws` adds to a row.
DRAW = "draw"  # its number among all draws of a run, which determines its crops
COUNTS = "counts"  # whether it counts in the loss
DRAWN = "drawn"  # marks a row that the run had before it was interrupted


@dataclass(frozen=True)
class Fault:
    """One fault of a row.

    Args:
        kind: a key of `FAULTS`.
        message: what was given, and what to write.
        fixed: whether the row is still read, without the faulty part.
    """

    kind: str
    message: str
    fixed: bool = False


def is_unicode(text: str) -> bool:
    """Whether a text can be stored: escapes in JSON can write half of a character."""
    return text.isascii() or LONE_SURROGATE.search(text) is None


class RowError(ValueError):
    """A row cannot be read; the message names the file and the row.

    Args:
        where: the file and the row's id.
        faults: all faults of the row.
    """

    def __init__(self, where: str, faults: list[Fault]) -> None:
        super().__init__(f"{where}: {' Also: '.join(fault.message for fault in faults)}")
        self.faults = faults


def row_error(name: str, kind: str, message: str) -> RowError:
    """Build the error for a fault of the row of this name."""
    return RowError(f"Row {short(name)}", [Fault(kind, message)])
