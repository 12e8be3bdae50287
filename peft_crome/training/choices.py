"""Multiple choice, as in ScienceQA and AI2D: which of the options an answer names, by its letter or in its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

# "B", "(b)", "B.", "B) because": the letter comes first, and ends there or at a mark.
LEADING = re.compile(r"\(?([A-Za-z])(?:[).:,]+(?=\s|$)|$)")
# "The answer is (B)", "Answer: B", "option B is right".
NAMED = re.compile(r"\b(?i:answer(?:\s+is)?|option|choice)\s*:?\s*(?:\(([A-Za-z])\)|([A-Z])\b)")
# Then "(B)" anywhere.
BRACKETED = re.compile(r"\(([A-Za-z])\)")


def chosen(answer: str, options: Sequence[str]) -> int | None:
    """The number of the option that an answer names; None: none, or not one alone.

    Looked for in this order: a letter that the answer begins with, an option's words as the whole answer, "the answer
    is B", a single option's words within the answer, a single letter in brackets. Where the options are letters
    themselves, as some of AI2D's, a bare letter is the option's, not its words: that is what was asked for.

    Args:
        answer: of the model, or the reference.
        options: their texts, in the order of their letters.

    Example:
        >>> [chosen(said, ["a cell", "a leaf"]) for said in ("B", "(a) since", "A leaf.", "It is a cell", "both")]
        [1, 0, 1, 0, None]
    """
    text = answer.replace("*", "").strip()  # Markdown's bold
    found = LEADING.match(text)
    if found is not None and (number := _number(found[1], options)) is not None:
        return number
    plain = [_words(option) for option in options]
    if _words(text) in plain:
        return plain.index(_words(text))
    found = NAMED.search(text)
    if found is not None and (number := _number(found[1] or found[2], options)) is not None:
        return number
    within = _within(_words(text), plain)
    if within:
        return within[0] if len(within) == 1 else None
    letters = {_number(letter, options) for letter in BRACKETED.findall(text)} - {None}
    return letters.pop() if len(letters) == 1 else None


def _number(letter: str, options: Sequence[str]) -> int | None:
    number = ascii_uppercase.index(letter.upper())
    return number if number < len(options) else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*", text.casefold()))


def _within(text: str, options: Sequence[str]) -> list[int]:
    """Options whose words stand in the text, but for those inside a longer one's ("leaf" in "leaf blade")."""
    found, rest = [], f" {text} "
    for number in sorted(range(len(options)), key=lambda n: -len(options[n])):
        if options[number] and f" {options[number]} " in rest:
            found.append(number)
            rest = rest.replace(f" {options[number]} ", "  ")
    return found
