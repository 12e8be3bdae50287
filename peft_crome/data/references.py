"""Read what an answer is compared with: several people's answers, or the options of a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from string import ascii_uppercase
from typing import Any

MOST_OPTIONS = len(ascii_uppercase)  # each has a letter
INSTRUCTION = "Answer with the option's letter from the given choices directly."  # the prompt of LLaVA-1.5


def as_texts(value: Any) -> list[str]:
    """Convert text, numbers, VQA's {"answer": text}, or {"A": text} to a list of texts; empty for anything else.

    Example:
        >>> as_texts([{"answer": "red", "answer_id": 1}, "dark red", 2])
        ['red', 'dark red', '2']
    """
    items = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        return []
    items = [item.get("answer") if isinstance(item, Mapping) else item for item in items]
    if not all(isinstance(item, str | Number) and not isinstance(item, bool) for item in items):
        return []  # the field means something else
    return [str(item) for item in items]


def as_choice(answer: Any, options: Sequence[str]) -> str | None:
    """Return the letter of the right option, given as its number from 0 (ScienceQA, AI2D), its text or its letter.

    None: the answer matches no option, or one after the 26th, which has no letter.

    Example:
        >>> as_choice(1, ["a cell", "a leaf"]), as_choice("a cell", ["a cell", "a leaf"])
        ('B', 'A')
    """
    letters = ascii_uppercase[: len(options)]
    if isinstance(answer, str) and answer.strip() in options:
        number = list(options).index(answer.strip())
        return letters[number] if number < len(letters) else None
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return letters[answer] if 0 <= answer < len(letters) else None
    letter = answer.strip().strip("().").upper() if isinstance(answer, str) else ""
    return letter if len(letter) == 1 and letter in letters else None


def with_options(question: str, options: Sequence[str]) -> str:
    """Append a line per option to the question, and LLaVA-1.5's request for a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines, INSTRUCTION])
