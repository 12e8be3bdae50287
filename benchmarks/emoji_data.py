"""Build the emoji task: name the kind of an object; 725 objects in 30 kinds, drawn by Google and by Twitter.

The drawings are Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter, CC-BY 4.0), from npm's `emoji-datasource-google`
and `emoji-datasource-twitter`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image, ImageOps

from examples.easy_vqa.data import CAPTION_REQUEST
from examples.easy_vqa.model import Images, cached_features
from examples.easy_vqa.parts import fetch

VENDORS = ("google", "twitter")
QUESTION = "What kind of thing is this?"
SIDE = 64  # pixels
VIEWS = 8  # training views of each of Google's drawings; the first is the drawing itself
HELD_OUT = 0.25  # share of the objects of a kind
# Unicode's subcategories with at least 12 objects, in plain words; people, faces, flags and symbols are left out.
KINDS = {
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-mammal": "mammal",
    "animal-marine": "sea animal",
    "book-paper": "paper",
    "clothing": "clothing",
    "computer": "computer",
    "drink": "drink",
    "event": "celebration",
    "food-asian": "asian food",
    "food-fruit": "fruit",
    "food-prepared": "dish",
    "food-sweet": "sweet",
    "food-vegetable": "vegetable",
    "game": "game",
    "household": "household",
    "light & video": "light",
    "mail": "mail",
    "musical-instrument": "instrument",
    "office": "office",
    "place-building": "building",
    "place-other": "place",
    "plant-flower": "flower",
    "plant-other": "plant",
    "sky & weather": "weather",
    "sport": "sport",
    "time": "time",
    "tool": "tool",
    "transport-air": "aircraft",
    "transport-ground": "vehicle",
}
LEFT_OUT = ("People & Body", "Smileys & Emotion", "Symbols", "Flags", "Component")


@dataclass(frozen=True)
class Thing:
    """One object: its number among `things()`, its kind in plain words, and its drawings' file name."""

    number: int
    kind: str
    image: str


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """Read the list of all drawings: name, category, subcategory, image, and more."""
    return tuple(json.loads((fetch("emoji-datasource-google") / "package" / "emoji.json").read_text()))


@cache
def things() -> tuple[Thing, ...]:
    """List the objects in the order of the file."""
    kept = [row for row in entries() if row["category"] not in LEFT_OUT and row["subcategory"] in KINDS]
    return tuple(Thing(number, KINDS[row["subcategory"]], row["image"]) for number, row in enumerate(kept))


def split(objects: tuple[Thing, ...], seed: int) -> tuple[list[Thing], list[Thing]]:
    """Split the objects into training objects and a held-out quarter of each kind."""
    generator = random.Random(seed)
    train, held_out = [], []
    for kind in sorted({thing.kind for thing in objects}):
        own = [thing for thing in objects if thing.kind == kind]
        generator.shuffle(own)
        count = round(HELD_OUT * len(own))
        held_out += own[:count]
        train += own[count:]
    return train, held_out


def drawing(vendor: str, thing: Thing, view: int = 0) -> Image.Image:
    """Open a vendor's drawing on white, 64 x 64. Views from 1 on are mirrored, rotated, scaled and moved at random."""
    folder = fetch(f"emoji-datasource-{vendor}") / "package" / "img" / vendor / "64"
    image = Image.open(folder / thing.image).convert("RGBA").resize((SIDE, SIDE))
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    if view == 0:
        return Image.alpha_composite(white, image).convert("RGB")
    generator = random.Random(f"{thing.image} {view}")
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(generator.uniform(-15, 15), Image.Resampling.BICUBIC)
    side = round(SIDE * generator.uniform(0.7, 1.0))
    place = (generator.randint(0, SIDE - side), generator.randint(0, SIDE - side))
    white.alpha_composite(image.resize((side, side), Image.Resampling.BICUBIC), place)
    return white.convert("RGB")


def images(vendor: str, views: int = 1) -> Images:
    """List a vendor's drawings of the objects; the views of an object are consecutive."""
    objects = things()
    return Images(
        f"emoji-{vendor}-{views}-views",
        len(objects) * views,
        lambda i: drawing(vendor, objects[i // views], i % views),
    )


def features(vendor: str, image_processor: Any, views: int = 1) -> torch.Tensor:
    """Compute the frozen tower's features of a vendor's drawings, (objects * views, 16, 384) fp16."""
    return cached_features(images(vendor, views), image_processor)


def rows(objects: list[Thing], count: int, seed: int, stage: str) -> list[dict[str, Any]]:
    """Draw `count` training rows of one view of an object each. Every object comes once before any is repeated.

    Args:
        stage: "align" makes the kind the drawing's caption; "finetune" makes it the answer to a question.
    """
    generator = random.Random(seed)
    order: list[Thing] = []
    while len(order) < count:
        order += generator.sample(objects, len(objects))
    result = []
    for thing in order[:count]:
        turn = [CAPTION_REQUEST if stage == "align" else QUESTION, thing.kind]
        result.append({"image_id": thing.number * VIEWS + generator.randrange(VIEWS), "turns": [turn]})
    return result


def questions(objects: list[Thing]) -> list[dict[str, Any]]:
    """Build test questions for `evaluation.answer`, whose features have one row per object."""
    return [{"image_id": thing.number, "question": QUESTION, "answer": thing.kind} for thing in objects]


def most_frequent_kind(train: list[Thing]) -> str:
    """Return the best guess without images: all questions have the same words, so it is one kind for all."""
    return Counter(thing.kind for thing in train).most_common(1)[0][0]
