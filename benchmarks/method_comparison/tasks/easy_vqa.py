"""easy-VQA: the color and the shape of one object, and yes/no questions in pairs."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from PIL import Image

from examples.easy_vqa import data
from examples.easy_vqa.model import Images
from examples.easy_vqa.parts import easy_vqa_dir
from examples.easy_vqa.trial import split as split_by_image

from .task import Question, Row, Split, taken

TRAIN, TEST = 4000, 1000  # images
SIDE, SMALL = 64, 40  # pixels
DARK = (45, 45, 45)


class EasyVqa:
    """One "what" question for each pair of yes/no questions, of which one is about the object shown."""

    name = "easy_vqa"
    title = "easy-VQA"
    shift = "smaller, on a dark background"
    per_step = 8

    def images(self) -> tuple[Images, ...]:
        return (
            Images("train", TRAIN, lambda i: _open("train", i)),
            Images("test", TEST, lambda i: _open("test", i)),
            Images("test-small-dark", TEST, _small_dark),
        )

    def rows(self, count: int, seed: int) -> list[Row]:
        return data.question_rows(_questions("train"), count, seed, questions_per_image=2, draw="paired")

    def questions(self, split: Split, count: int, seed: int) -> list[Question]:
        first = {"validation": 0, "test": TRAIN, "shifted": TRAIN + TEST}[split]
        pool = _questions("validation" if split == "validation" else "test")
        rows = data.question_rows(pool, count // 3, seed, questions_per_image=2, draw="paired")
        return [
            {"image_id": first + row["image_id"], "question": q, "answer": a, "kind": data.kind_of(a)}
            for row in rows
            for q, a in row["turns"]
        ]

    def captions(self, split: Literal["train", "test"], count: int, seed: int) -> list[tuple[int, str]]:
        known = data.captions(_questions(split))
        first = 0 if split == "train" else TRAIN
        return [(first + i, known[i]) for i in taken(sorted(known), count, seed)]


@cache
def _questions(split: str) -> list[dict[str, Any]]:
    if split == "test":
        return data.load_questions("test")
    train, validation = split_by_image(data.load_questions("train"))
    return train if split == "train" else validation


def _open(split: str, number: int) -> Image.Image:
    return Image.open(easy_vqa_dir() / split / "images" / f"{number}.png")


def _small_dark(number: int) -> Image.Image:
    canvas = Image.new("RGB", (SIDE, SIDE), DARK)
    corner = (SIDE - SMALL) // 2
    canvas.paste(_open("test", number).convert("RGB").resize((SMALL, SMALL), Image.Resampling.BICUBIC), (corner,) * 2)
    return canvas
