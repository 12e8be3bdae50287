"""Grids of four emoji: what is where, how many of a category, and whether something is there."""

from __future__ import annotations

import random
from functools import cache
from typing import Literal

from PIL import Image

from benchmarks import emoji_data
from benchmarks.emoji_data import VIEWS, Thing
from examples.easy_vqa.model import Images

from .task import Question, Row, Split, taken

# Names of the drawings in emoji.json, in lower case, by the plural of their category.
OBJECTS = {
    "animals": ("tiger", "elephant", "koala", "hedgehog"),
    "fruits": ("banana", "grapes", "pineapple", "strawberry"),
    "vehicles": ("bus", "tractor", "bicycle", "ambulance"),
    "instruments": ("guitar", "trumpet", "violin", "harp"),
}
CATEGORY = {name: category for category, names in OBJECTS.items() for name in names}
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("zero", "one", "two", "three")
SIDE = 56  # pixels of a drawing; a grid has 112
TRAIN, VALIDATION, TEST = 1200, 100, 200  # grids, numbered in this order
FIRST = {"validation": TRAIN, "test": TRAIN + VALIDATION, "shifted": TRAIN + VALIDATION + TEST}


class EmojiGrids:
    """Grids of 16 objects, drawn by Google; the split "shifted" has the test's grids as Twitter has drawn them."""

    name = "emoji_grids"
    title = "emoji, grids"
    shift = "another vendor's drawings"
    per_step = 8

    def images(self) -> tuple[Images, ...]:
        first = FIRST["test"]
        return (
            Images("emoji-grids-google", first + TEST, lambda i: draw("google", i)),
            Images("emoji-grids-twitter", TEST, lambda i: draw("twitter", first + i)),
        )

    def rows(self, count: int, seed: int) -> list[Row]:
        chosen = taken(range(TRAIN), count, seed)
        return [{"image_id": i, "turns": [[q, a] for q, a, _ in ask(i)]} for i in chosen]

    def questions(self, split: Split, count: int, seed: int) -> list[Question]:
        size = VALIDATION if split == "validation" else TEST
        first = FIRST["validation" if split == "validation" else "test"]
        return [
            {"image_id": FIRST[split] + i, "question": question, "answer": answer, "kind": kind}
            for i in taken(range(size), min(count // 3, size), seed)
            for question, answer, kind in ask(first + i)
        ]

    def captions(self, split: Literal["train", "test"], count: int, seed: int) -> list[tuple[int, str]]:
        first, size = (0, TRAIN) if split == "train" else (FIRST["test"], TEST)
        return [(first + i, ", ".join(grid(first + i)[0])) for i in taken(range(size), count, seed)]


@cache
def grid(number: int) -> tuple[tuple[str, ...], str, int]:
    """Return a grid's objects in reading order, the category that is counted, and how many of it there are.

    The number of objects is drawn first, so that each of `COUNTS` is equally frequent.
    """
    generator = random.Random(f"grid {number}")
    category, count = generator.choice(list(OBJECTS)), generator.randrange(len(COUNTS))
    others = [name for name in CATEGORY if CATEGORY[name] != category]
    shown = generator.sample(OBJECTS[category], count) + generator.sample(others, len(PLACES) - count)
    generator.shuffle(shown)
    return tuple(shown), category, count


def ask(number: int) -> list[tuple[str, str, str]]:
    """Return a grid's three questions, each with its answer and its kind."""
    shown, category, count = grid(number)
    generator = random.Random(f"questions {number}")
    place = generator.randrange(len(PLACES))
    present = generator.random() < 0.5
    name = generator.choice(sorted(name for name in CATEGORY if (name in shown) == present))
    return [
        (f"What is at the {PLACES[place]}?", shown[place], "where"),
        (f"How many {category} are there?", COUNTS[count], "how many"),
        (f"Is there {_with_article(name)}?", "yes" if present else "no", "yes/no"),
    ]


def draw(vendor: str, number: int) -> Image.Image:
    """Draw a grid, 112 x 112, with a random view of each object."""
    generator = random.Random(f"views {number}")
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    for place, name in enumerate(grid(number)[0]):
        drawing = emoji_data.drawing(vendor, _thing(name), generator.randrange(VIEWS))
        canvas.paste(drawing.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (place % 2 * SIDE, place // 2 * SIDE))
    return canvas


@cache
def _thing(name: str) -> Thing:
    number, row = next((i, row) for i, row in enumerate(emoji_data.entries()) if row["name"] == name.upper())
    return Thing(number, CATEGORY[name], row["image"])


def _with_article(name: str) -> str:
    if name == "grapes":
        return "a bunch of grapes"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
