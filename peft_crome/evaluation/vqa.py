"""Compute VQA accuracy: an answer counts by the number of people who gave it."""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREEING = 3  # number of people who make an answer fully right
LEAST = AGREEING + 1  # number of answers, so that leaving one out leaves enough

COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(COUNTED)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
SHORT = (
    "ain't aren't can't couldn't could've didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm i've "
    "isn't it'd it'll let's might've mustn't must've she's shouldn't should've somebody's someone's something's "
    "that's there'd there's they'd they're they've wasn't we've weren't what'll what're what's where'd where's who'd "
    "who'll who's who've won't wouldn't would've y'all you'd you'll you're you've"
)
CONTRACTIONS = {word.replace("'", ""): word for word in SHORT.split()}
BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
OTHER_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")


def normalize(text: str) -> str:
    """Normalize an answer as VQAv2's evaluation does.

    Lower case; no full stops except in decimal numbers; punctuation except apostrophe and colon becomes a space;
    numbers up to ten as digits; no articles; contractions with their apostrophe.

    Source: the rules on visualqa.org/evaluation. Its script skips this if all people agree; this function
    always normalizes.

    Example:
        >>> normalize("The  two dogs, 1,000.5 m-long; dont.")
        "2 dogs 1000.5 m long don't"
    """
    text = FULL_STOP.sub("", BETWEEN_DIGITS.sub("", text.lower()))
    words = [NUMBERS.get(word, word) for word in OTHER_PUNCTUATION.sub(" ", text).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, people: Sequence[str]) -> float:
    """Compute min(1, n / 3) for n other people with the same answer, averaged over leaving each person out.

    Args:
        answer: answer of the model.
        people: ten answers in VQAv2.
    Returns:
        From 0 to 1.
    Source: Antol et al., "VQA: Visual Question Answering", and VQAv2's evaluation.

    Example:
        >>> round(agreement("Blue.", ["blue"] * 3 + ["navy"] * 7), 3)
        0.9
    """
    normalized = normalize(answer)
    same = [normalize(person) == normalized for person in people]
    shares = [min(1.0, (sum(same) - agrees) / AGREEING) for agrees in same]
    return sum(shares) / len(shares)
