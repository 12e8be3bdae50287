"""Emoji: name an object's kind. Objects are new in the test, and the drawings' style too where it is shifted."""

from __future__ import annotations

from typing import Literal

from benchmarks import emoji_data
from benchmarks.emoji_data import VIEWS, Thing
from examples.easy_vqa.model import Images

from .task import Question, Row, Split, taken

VALIDATION_SEED = 1000


class EmojiKinds:
    """Trains on Google's drawings; the split "shifted" asks about the test's objects as Twitter has drawn them."""

    name = "emoji_kinds"
    title = "emoji, kind"
    shift = "another vendor's drawings"
    per_step = 16

    def images(self) -> tuple[Images, ...]:
        return emoji_data.images("google", VIEWS), emoji_data.images("twitter")

    def rows(self, count: int, seed: int) -> list[Row]:
        return emoji_data.rows(_objects("train", seed), count, seed, "finetune")

    def questions(self, split: Split, count: int, seed: int) -> list[Question]:
        objects = _objects("validation" if split == "validation" else "test", seed)
        first, views = (len(emoji_data.things()) * VIEWS, 1) if split == "shifted" else (0, VIEWS)
        return [
            {**row, "image_id": first + views * row["image_id"], "kind": "kind"}
            for row in emoji_data.questions(list(taken(objects, min(count, len(objects)), seed)))
        ]

    def captions(self, split: Literal["train", "test"], count: int, seed: int) -> list[tuple[int, str]]:
        return [(VIEWS * thing.number, thing.kind) for thing in taken(_objects(split, seed), count, seed)]


def _objects(split: str, seed: int) -> list[Thing]:
    rest, test = emoji_data.split(emoji_data.things(), seed)
    train, validation = emoji_data.split(tuple(rest), seed + VALIDATION_SEED)
    return {"train": train, "validation": validation, "test": test}[split]
