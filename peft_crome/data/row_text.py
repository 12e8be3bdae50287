"""Rows as the chat template writes them, and their lengths before and after tokenization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .answer_spans import Messages, Span

Made = TypeVar("Made")


@dataclass(frozen=True)
class RowText:
    """Text of a row.

    Attributes:
        messages: messages with the system message.
        text: the messages as rendered by the chat template.
        pieces: pieces of the text between its media.
        order: number of the medium after each piece except the last.
        spans: spans of the answers in the text.
        target: tokens of an encoder-decoder's answer.
        instruction: text that a Q-Former reads.
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
        text: expanded text, with each run of a token written once.
        left_out: number of tokens in the runs that are not written.
        spans: spans of the answers in the text.
    """

    read: RowText
    text: str
    left_out: int
    spans: list[Span]

    def is_learned(self, encoding: Any) -> bool:
        """Whether some token contains an end of an answer; otherwise the row needs a full check."""
        ends = (place for first, last in self.spans if first < last for place in (first, last - 1))
        return self.read.target is not None or any(encoding.char_to_token(place) is not None for place in ends)


@dataclass(frozen=True)
class RowSize:
    """Lengths of a row.

    Attributes:
        length: tokens before a cut.
        kept: tokens after the cut.
    """

    length: int
    kept: int


def or_error(function: Callable[[dict[str, Any]], Made], row: dict[str, Any]) -> Made | ValueError:
    """Return the result of a function for a row, or its error."""
    try:
        return function(row)
    except ValueError as error:
        return error
