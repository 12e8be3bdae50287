"""Where a chat template writes an image, and which tokens a processor makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from .answer_spans import ANSWER, QUESTION, Messages, turn
from .processed import Processed, Tokens, UnknownPlaceholder, user_turn

Size = tuple[int, int]  # width and height
PROBES: tuple[Size, ...] = ((64, 64), (448, 224), (350, 1000))
KEPT = 4096  # sizes of images, whose expansions have up to 20 kB


class Expansion:
    """What a chat template writes for an image, and what the processor expands it to.

    The template is tried with an image and without one. The text of an expanded prompt is the rendered text with each
    placeholder replaced, so characters of the one are found in the other.

    Args:
        processed: the processor, watched.
        render: messages, and whether a prompt for an answer ends them -> text.
        before: messages that the template demands before a question.
    Raises:
        UnknownPlaceholder: the processor's text is not the rendered text with placeholders replaced.
    """

    def __init__(self, processed: Processed, render: Callable[[Messages, bool], str], before: Messages) -> None:
        self._processed, self._render, self._before = processed, render, before
        self._placeholder, self._is_numbered = self._find_placeholder()
        self._expansions = lru_cache(KEPT)(self._expand_sizes)
        made = {self._expansions((size,)) for size in PROBES}
        self.is_fixed = len(made) == 1  # then an image's size does not matter

    @property
    def placeholder(self) -> str:
        """What the template writes for the first image; empty where the processor puts images in by itself."""
        return self._placeholder

    def pieces(self, text: str, images: int) -> list[str]:
        """A rendered text without its placeholders: one piece more than it has images.

        Raises:
            UnknownPlaceholder: the text holds more or fewer placeholders than images.
        """
        pieces, rest = [], text
        for number in range(1, images + 1 if self._placeholder else 1):
            piece, found, rest = rest.partition(self._written(number))
            if not found:
                raise UnknownPlaceholder(f"{number - 1} {self._placeholder!r} in the text for {images} images")
            pieces.append(piece)
        if self._placeholder and self._written(images + 1) in rest:
            more = images + rest.count(self._written(images + 1))
            raise UnknownPlaceholder(f"{more} {self._placeholder!r} in the text for {images} images")
        return [*pieces, rest]

    def starts(self, pieces: Sequence[str], expanded: str) -> list[int]:
        """Where each piece begins in an expanded text.

        Raises:
            UnknownPlaceholder: the text does not hold the pieces in their order.
        """
        found, place = [], 0
        for piece in pieces[:-1]:
            start = expanded.find(piece, place)
            if start < 0:
                break
            found.append(start)
            place = start + len(piece)
        last = expanded.rfind(pieces[-1])
        if len(found) < len(pieces) - 1 or last < place:
            raise UnknownPlaceholder(
                f"{type(self._processed.processor).__name__} changes the words of a conversation, so the tokens of an "
                "answer cannot be found"
            )
        return [*found, last]

    def spans(
        self, spans: Sequence[tuple[int, int]], pieces: Sequence[str], text: str, expanded: str
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Spans of a rendered text as spans of the expanded one, and those of the images there.

        Raises:
            UnknownPlaceholder: as `starts`, or a span holds an image.
        """
        starts = self.starts(pieces, expanded)
        ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        edges, place = [], 0  # of the pieces in the rendered text
        for piece in pieces:
            place = text.index(piece, place)
            edges.append(place)
            place += len(piece)
        moved = []
        for first, last in spans:
            number = max(n for n, edge in enumerate(edges) if edge <= first)
            if last > edges[number] + len(pieces[number]):
                raise UnknownPlaceholder("an answer that shows an image")
            moved.append((first + starts[number] - edges[number], last + starts[number] - edges[number]))
        between = [
            (end, start) for end, start in zip([0, *ends], [*starts, len(expanded)], strict=True) if end < start
        ]
        return moved, between

    def expand(self, pieces: Sequence[str], sizes: Sequence[Size]) -> str:
        """The text that the processor would give its tokenizer, for images of these sizes."""
        made = self._expansions(PROBES[:1] * len(sizes) if self.is_fixed else tuple(sizes))
        between = made[1:-1] if self._placeholder else ()
        text = "".join(part for pair in zip(pieces, (*between, ""), strict=True) for part in pair)
        return made[0] + text + made[-1]

    def _written(self, number: int) -> str:
        return self._placeholder.replace("1", str(number)) if self._is_numbered else self._placeholder

    def _find_placeholder(self) -> tuple[str, bool]:
        one = self._difference(1)
        if not one:
            return "", False
        try:
            two = self._difference(2)
        except TemplateError:  # it takes one image
            return one, False
        return one, "1" in one and two.count(one) < 2 and one.replace("1", "2") in two

    def _difference(self, images: int) -> str:
        """What a prompt with images has more than one without."""
        blank = Image.new("RGB", PROBES[0])
        without = self._render([*self._before, user_turn([QUESTION])], True)
        shown = self._render([*self._before, user_turn([*[blank] * images, QUESTION])], True)
        first = next((n for n, (a, b) in enumerate(zip(without, shown, strict=False)) if a != b), len(without))
        rest, tail = without[first:], 0
        while tail < min(len(rest), len(shown) - first) and rest[-1 - tail] == shown[-1 - tail]:
            tail += 1
        return shown[first : len(shown) - tail].strip()

    def _probe(self, sizes: tuple[Size, ...]) -> tuple[str, Messages]:
        """A prompt that shows images, each in a turn of its own, where the template takes several turns."""
        shown: list[tuple[Any, ...]] = [
            (Image.new("RGB", size), f"({number})") for number, size in enumerate(sizes)
        ] or [(QUESTION,)]
        apart = [message for parts in shown for message in (user_turn(parts), turn("assistant", ANSWER))][:-1]
        messages = [*self._before, *apart]
        try:
            return self._render(messages, True), messages
        except TemplateError:
            messages = [*self._before, user_turn([part for parts in shown for part in parts])]
            return self._render(messages, True), messages

    def _expand_sizes(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """What stands before the text, for each image, and after the text."""
        text, messages = self._probe(sizes)
        _, (tokens,) = self._processed.batch([messages], [text])
        pieces = self.pieces(text, len(sizes))
        starts = self.starts(pieces, tokens.text)
        ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        between = zip([0, *ends], [*starts, len(tokens.text)], strict=True)
        return tuple(tokens.text[end:start] for end, start in between)


def tokens_in(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of the tokens that hold a character of one of the spans, which are in order."""
    found, number = [], 0
    for index, (first, last) in enumerate(tokens.offsets):
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        if number < len(spans) and spans[number][0] < last:
            found.append(index)
    return found
