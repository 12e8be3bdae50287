"""A row as the chat template writes it, and how long it is, before and after it is tokenized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .answer_spans import Messages, Span

Made = TypeVar("Made")


@dataclass(frozen=True)
class RowText:
    """What is said in a row.

    Attributes:
        messages: with the system message.
        text: as the chat template renders it.
        pieces: of the text, between its media.
        order: which of the media stands behind each piece but the last.
        spans: of the answers in the text.
        target: tokens of an encoder-decoder's answer.
        instruction: what a Q-Former reads.
    """

    messages: Messages
    text: str
    pieces: list[str]
    order: list[int]
    spans: list[Span]
    target: list[int] | None
    instruction: str


@dataclass(frozen=True)
class Draft:
    """A row before it is tokenized.

    Attributes:
        text: expanded, with each run of a token written once.
        left_out: tokens of the runs that are not written.
        spans: of the answers in the text.
    """

    read: RowText
    text: str
    left_out: int
    spans: list[Span]

    def is_learned(self, encoding: Any) -> bool:
        """Whether some token holds an end of an answer; else it takes a closer look."""
        ends = (place for first, last in self.spans if first < last for place in (first, last - 1))
        return self.read.target is not None or any(encoding.char_to_token(place) is not None for place in ends)


@dataclass(frozen=True)
class RowSize:
    """How long a row is.

    Attributes:
        length: tokens, before a cut.
        kept: tokens, after it.
        target: labels, which an encoder-decoder has of the answer alone.
        instruction: what a Q-Former reads.
    """

    length: int
    kept: int
    target: int
    instruction: str


def or_error(function: Callable[[dict[str, Any]], Made], row: dict[str, Any]) -> Made | ValueError:
    """What a function makes of a row, or its error."""
    try:
        return function(row)
    except ValueError as error:
        return error
