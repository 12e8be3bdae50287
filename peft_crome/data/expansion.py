"""Find where a chat template writes an image, a video or a sound, and which tokens a processor makes of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

from jinja2 import TemplateError

from .answer_spans import ANSWER, QUESTION, Messages, turn
from .media import NOUNS
from .media_reader import EXAMPLES, Header, MediaReader
from .processed import Processed, Tokens, UnknownPlaceholder
from .taken import kinds_taken

PROBES: tuple[Header, ...] = (("image", (64, 64)), ("image", (448, 224)), ("image", (350, 1000)))
KEPT = 1 << 14  # expansions kept, one for each combination of headers in a row
Run = tuple[str, int]  # a text and its number of repetitions


class Expansion:
    """Find a chat template's placeholder for an image, a video or a sound, and the processor's expansion of it.

    The template is tried with a medium and without one. An expanded prompt is the rendered text with each placeholder
    replaced, so characters of one can be found in the other.

    Args:
        processed: the recorded processor.
        render: function of messages, and whether a prompt for an answer ends them -> text.
        before: messages that the template requires before a question.
        reader: makes media of a given size to try.
    Raises:
        UnknownPlaceholder: the processor's text is not the rendered text with placeholders replaced.
    """

    def __init__(
        self,
        processed: Processed,
        render: Callable[[Messages, bool], str],
        before: Messages,
        reader: MediaReader,
    ) -> None:
        self._processed, self._render, self._before, self._reader = processed, render, before, reader
        self.kinds = [kind for kind in EXAMPLES if kind in kinds_taken(processed.processor)]
        self._placeholders = {kind: self._find_placeholder(kind) for kind in self.kinds}
        self._expansions = lru_cache(KEPT)(self._expand_media)

    @cached_property
    def is_fixed(self) -> bool:
        """Whether all images have the same tokens, so that their sizes do not matter."""
        first, *others = (self._expansions((probe,)) for probe in PROBES)
        return all(other == first for other in others)

    def placeholder(self, kind: str) -> str:
        """Return the template's text for the first medium of a kind.

        Empty if the processor inserts images itself, or if the model takes no such media.
        """
        return self._placeholders.get(kind, ("", False))[0]

    def pieces(self, text: str, kinds: Sequence[str]) -> tuple[list[str], list[int]]:
        """Split a rendered text at its placeholders.

        Args:
            kinds: kinds of the conversation's media, in the order of its parts.
        Returns:
            The text's pieces, one more than placeholders; and the number of the medium after each piece except the
            last, since some templates write all images of a turn before its videos.
        Raises:
            UnknownPlaceholder: the numbers of placeholders and media differ.
        """
        for kind in set(kinds) - {"image"}:
            if not self.placeholder(kind):
                wrong = f"the chat template writes nothing for a {NOUNS[kind]}"
                raise UnknownPlaceholder(f"{wrong}. Write another chat_template, or take the row out.")
        counts, seen = Counter(kinds), Counter[str]()
        pieces, shown, rest = [], [], text
        while found := [
            (place, seen[kind] >= counts[kind], kind, mark)
            for kind in self.kinds
            if (mark := self._written(kind, seen[kind] + 1)) and (place := rest.find(mark)) >= 0
        ]:
            place, _, kind, mark = min(found)  # where two kinds have one placeholder, the kind that is still to come
            pieces.append(rest[:place])
            shown.append(kind)
            seen[kind] += 1
            rest = rest[place + len(mark) :]
        for kind in self.kinds:
            if (mark := self.placeholder(kind)) and seen[kind] != counts[kind]:
                raise UnknownPlaceholder(
                    f"{seen[kind]} {mark!r} in the text for {counts[kind]} {NOUNS[kind]}s. "
                    f"Take {mark!r} out of the text."
                )
        numbers = {kind: iter([n for n, other in enumerate(kinds) if other == kind]) for kind in self.kinds}
        return [*pieces, rest], [next(numbers[kind]) for kind in shown]

    def starts(self, pieces: Sequence[str], expanded: str) -> list[int]:
        """Find the beginning of each piece in an expanded text.

        Raises:
            UnknownPlaceholder: the text does not contain the pieces in their order.
        """
        starts, place = [], 0
        for piece in pieces[:-1]:
            start = expanded.find(piece, place)
            if start < 0:
                break
            starts.append(start)
            place = start + len(piece)
        last = expanded.rfind(pieces[-1])
        if len(starts) < len(pieces) - 1 or last < place:
            raise UnknownPlaceholder(
                f"{type(self._processed.processor).__name__} changes the words of a conversation, so the tokens of an "
                "answer cannot be found"
            )
        return [*starts, last]

    def spans(
        self, spans: Sequence[tuple[int, int]], pieces: Sequence[str], text: str, expanded: str
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Convert spans of a rendered text to spans of the expanded one, and find those of the media in it.

        Raises:
            UnknownPlaceholder: as in `starts`, or a span contains a medium.
        """
        starts, edges = self.starts(pieces, expanded), self.starts(pieces, text)
        moved = []
        for first, last in spans:
            number = max(n for n, edge in enumerate(edges) if edge <= first)
            if last > edges[number] + len(pieces[number]):
                raise UnknownPlaceholder("an answer that shows an image, a video or a sound")
            moved.append((first + starts[number] - edges[number], last + starts[number] - edges[number]))
        return moved, [(first, last) for first, last in _gaps(starts, pieces, expanded) if first < last]

    def expand(self, pieces: Sequence[str], order: Sequence[int], media: Sequence[Header]) -> list[Run]:
        """Build the text that the processor would give to its tokenizer.

        Args:
            pieces, order: result of `pieces`.
            media: headers of the conversation's media, in the order of its parts.
        Returns:
            Runs. A text that is repeated is a single token.
        """
        first, each, last = self._expansions(tuple(media))
        between = [*(each[number] for number in order), last]
        inner = [run for piece, runs in zip(pieces, between, strict=True) for run in ((piece, 1), *runs)]
        return [*first, *inner]

    def _written(self, kind: str, number: int) -> str:
        placeholder, is_numbered = self._placeholders[kind]
        return placeholder.replace("1", str(number)) if is_numbered else placeholder

    def _find_placeholder(self, kind: str) -> tuple[str, bool]:
        try:
            one = self._difference(kind, 1)
        except TemplateError:
            if kind == "image":
                raise
            return "", False  # the template supports no such part
        try:
            two = self._difference(kind, 2) if "1" in one else ""
        except TemplateError:  # it takes a single image
            return one, False
        return one, "1" in one and two.count(one) < 2 and one.replace("1", "2") in two

    def _difference(self, kind: str, count: int) -> str:
        """Return the text that a prompt with media has in addition to one without."""
        blank = self._reader.blank(EXAMPLES[kind]) if kind == "image" else {"type": kind, kind: None}
        without = self._render([*self._before, turn("user", QUESTION)], True)
        shown = self._render([*self._before, turn("user", *[blank] * count, QUESTION)], True)
        first = next((n for n, (a, b) in enumerate(zip(without, shown, strict=False)) if a != b), len(without))
        rest, tail = without[first:], 0
        while tail < min(len(rest), len(shown) - first) and rest[-1 - tail] == shown[-1 - tail]:
            tail += 1
        return shown[first : len(shown) - tail].strip()

    def _probe(self, media: tuple[Header, ...]) -> tuple[str, Messages]:
        """Build a prompt that shows media, each in a separate turn if the template takes several turns."""
        shown: list[tuple[Any, ...]] = [
            (self._reader.blank(header), f"({number})") for number, header in enumerate(media)
        ] or [(QUESTION,)]
        apart = [message for parts in shown for message in (turn("user", *parts), turn("assistant", ANSWER))][:-1]
        messages = [*self._before, *apart]
        try:
            return self._render(messages, True), messages
        except TemplateError:
            messages = [*self._before, turn("user", *chain.from_iterable(shown))]
            return self._render(messages, True), messages

    def _expand_media(self, media: tuple[Header, ...]) -> tuple[list[Run], list[list[Run]], list[Run]]:
        """Return the runs before the text, for each medium, and after the text."""
        text, messages = self._probe(media)
        _, (tokens,) = self._processed.batch([messages], [text])
        pieces, order = self.pieces(text, [kind for kind, _ in media])
        gaps = _gaps(self.starts(pieces, tokens.text), pieces, tokens.text)
        first, *between, last = (self._runs(tokens.text[start:end]) for start, end in gaps)
        each = dict(zip(order, between, strict=True))
        return first, [each.get(number, []) for number in range(len(media))], last

    def _runs(self, text: str) -> list[Run]:
        repeated = [token for token in self._processed.added_tokens if token * 2 in text]
        repeated = [token for token in repeated if self._processed.stands_alone(token)]
        runs = "|".join(f"(?:{re.escape(token)})+" for token in repeated)
        made: list[Run] = []
        for number, part in enumerate(re.split(f"({runs})", text) if runs else [text]):
            token = next((token for token in repeated if part.startswith(token)), part) if number % 2 else part
            made += [(token, len(part) // len(token))] if part else []
        return made


def _gaps(starts: Sequence[int], pieces: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Return the spans of a text before, between and after its pieces."""
    ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
    return list(zip([0, *ends], [*starts, len(text)], strict=True))


def written_out(runs: Sequence[Run]) -> str:
    """Write runs out as text."""
    return "".join(text * count for text, count in runs)


def shortened(runs: Sequence[Run]) -> tuple[str, int]:
    """Write each run once; also return how many tokens are left out."""
    return "".join(text for text, _ in runs), sum(count - 1 for _, count in runs)


def tokens_in(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the numbers of the tokens that overlap one of the spans, which are in order."""
    indices, number = [], 0
    for index, (first, last) in enumerate(tokens.offsets):
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        if number < len(spans) and spans[number][0] < last:
            indices.append(index)
    return indices
