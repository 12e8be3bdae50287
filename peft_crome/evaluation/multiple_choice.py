"""Score multiple choice, as in ScienceQA and AI2D: find the option that an answer names by its letter or words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

# "B", "(b)", "B.", "B) because": the letter comes first, followed by a mark or the end.
LEADING = re.compile(r"\(?([A-Za-z])(?:[).:,]+(?=\s|$)|$)")
# "The answer is (B)", "Answer: B"; then "option B is right".
LETTER = r"(?:\(([A-Za-z])\)|([A-Z])\b)"
NAMED = [re.compile(rf"\b(?i:{word})\s*:?\s*{LETTER}") for word in (r"answer(?:\s+is)?", "option|choice")]
# Another letter beside one: ") and (B)", " or B", "/B"; and ", B" if the letter ends the text, unlike "B is wrong".
JOINED = re.compile(
    r"\)?(?:,?\s*(?:\b(?:and|or)\b|[&/+])\s*(?:\(([A-Za-z])\)|([A-Zb-z])\b)"
    r"|[,\s]\s*(?:\(([A-Za-z])\)|([A-Za-z]))(?=\s*(?:[.,;:&/)+]|\b(?:and|or)\b|$)))"
)
# A further letter as in LEADING, at the beginning of a sentence or a line; "B:" and "B)" after a comma as well.
SET_OFF = re.compile(r"(?:^|[.;:!?]\s+|\n\s*)\(?([A-Za-z])[).:]+(?=\s|$)|,\s*([A-Za-z])[):]+(?=\s|$)")
# Then "(B)" anywhere.
BRACKETED = re.compile(r"\(([A-Za-z])\)")


def chosen(answer: str, options: Sequence[str]) -> int | None:
    """Return the number of the option that an answer names; None if it names none or several.

    The ways are tried in this order: a letter at the beginning, an option's words as the whole answer, "the answer
    is B", a single option's words within the answer, a single letter in brackets. If the options are letters
    themselves, as some are in AI2D, a bare letter names an option's letter, as the prompt asks, and not its words.

    If an answer names several letters in one of these ways, none is chosen: joined letters ("A, B", "(A) and (B)",
    "the answer is A or B", "A/B"), a later sentence or line that begins with a letter and a mark ("A: no. B: yes"),
    "the answer is B" after another first letter. A letter within a sentence does not count ("B) because A is wrong",
    "(A), since (B) is wrong"), nor does the article "a". "option A" counts only if no "answer" is named.

    Args:
        answer: answer of the model, or the reference.
        options: texts of the options, in the order of their letters.

    Example:
        >>> [chosen(answer, ["a cell", "a leaf"]) for answer in ("B", "(a) since", "A leaf.", "It is a cell", "both")]
        [1, 0, 1, 0, None]
    """
    text = answer.replace("*", "").strip()  # bold in Markdown
    plain = [_words(option) for option in options]
    whole = plain.index(_words(text)) if _words(text) in plain else None
    match = LEADING.match(text)
    if match is not None and (number := _number(match[1], options)) is not None:
        others = _beside(text[match.end(1) :], number, options, SET_OFF) | _named(NAMED[0], text, options)
        return number if others <= {number} else whole
    if whole is not None:
        return whole
    ways = [_named(pattern, text, options) for pattern in NAMED]
    ways += [_within(_words(text), plain), _numbers(BRACKETED.findall(text), options)]
    numbers = next(filter(None, ways), set())
    return numbers.pop() if len(numbers) == 1 else None


def _number(letter: str, options: Sequence[str]) -> int | None:
    number = ascii_uppercase.index(letter.upper())
    return number if number < len(options) else None


def _numbers(letters: Iterable[str], options: Sequence[str]) -> set[int]:
    return {number for letter in letters if (number := _number(letter, options)) is not None}


def _named(pattern: re.Pattern[str], text: str, options: Sequence[str]) -> set[int]:
    """Find options whose letters come after a word such as "answer", or are joined to such a letter."""
    numbers = set()
    for match in pattern.finditer(text):
        number = _number(match[1] or match[2], options)
        if number is not None:
            numbers |= {number} | _beside(text[match.end() :], number, options)
    return numbers


def _beside(rest: str, number: int, options: Sequence[str], *patterns: re.Pattern[str]) -> set[int]:
    """Find options whose letters are named beside option `number`, which `rest` follows, ignoring its words."""
    tail = rest.lstrip(" ).:,")
    if options[number] and tail.casefold().startswith(options[number].casefold()):
        rest = tail[len(options[number]) :]
    joined = JOINED.match(rest)
    letters = [joined] if joined is not None else []
    letters += [match for pattern in patterns for match in pattern.finditer(rest)]
    return _numbers((next(filter(None, match.groups())) for match in letters), options)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*", text.casefold()))


def _within(text: str, options: Sequence[str]) -> set[int]:
    """Find options whose words are in the text, except inside a longer option's words ("leaf" in "leaf blade")."""
    numbers, rest = set(), f" {text} "
    for number in sorted(range(len(options)), key=lambda n: -len(options[n])):
        if options[number] and f" {options[number]} " in rest:
            numbers.add(number)
            rest = rest.replace(f" {options[number]} ", "  ")
    return numbers
