"""Handwritten digits, by writers who are new in the test; black and white change places where it is shifted."""

from __future__ import annotations

from typing import Literal

from PIL import ImageOps

from examples.easy_vqa.model import Images
from examples.mixture.experiment import QUESTION, TRAINING_DIGITS, WORDS, digit_image, digits

from .task import Question, Row, Split, taken

VALIDATION = 200  # the last of the training digits
TOTAL = 1797


class Digits:
    """scikit-learn's digits, in the order of the people who wrote them."""

    name = "digits"
    title = "digits"
    shift = "black on white"
    per_step = 16

    def images(self) -> tuple[Images, ...]:
        return (
            Images("digits", TOTAL, digit_image),
            Images(
                "digits-black-on-white",
                TOTAL - TRAINING_DIGITS,
                lambda i: ImageOps.invert(digit_image(TRAINING_DIGITS + i)),
            ),
        )

    def rows(self, count: int, seed: int) -> list[Row]:
        chosen = taken(range(TRAINING_DIGITS - VALIDATION), count, seed)
        return [{"image_id": i, "turns": [[QUESTION, _word(i)]]} for i in chosen]

    def questions(self, split: Split, count: int, seed: int) -> list[Question]:
        validation = range(TRAINING_DIGITS - VALIDATION, TRAINING_DIGITS)
        pool = validation if split == "validation" else range(TRAINING_DIGITS, TOTAL)
        moved = TOTAL - TRAINING_DIGITS if split == "shifted" else 0
        return [
            {"image_id": i + moved, "question": QUESTION, "answer": _word(i), "kind": "digit"}
            for i in taken(pool, min(count, len(pool)), seed)
        ]

    def captions(self, split: Literal["train", "test"], count: int, seed: int) -> list[tuple[int, str]]:
        pool = range(TRAINING_DIGITS - VALIDATION) if split == "train" else range(TRAINING_DIGITS, TOTAL)
        return [(i, _word(i)) for i in taken(pool, count, seed)]


def _word(number: int) -> str:
    return WORDS[digits().target[number]]
