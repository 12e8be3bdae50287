"""Words in print: read a word. The fonts are new where the test is shifted.

The fonts come with matplotlib: DejaVu (free, derived from Bitstream Vera), STIX (STIX Font License) and BaKoMa's
Computer Modern (BaKoMa license). Their license texts are in matplotlib's package.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from examples.easy_vqa.model import Images

from .task import Question, Row, Split, taken

QUESTION = "Which word is written here?"
WORDS = (
    *("apple", "arm", "bank", "bear", "bird", "boat", "book", "bread", "bridge", "car", "chair", "child", "clock"),
    *("cloud", "coat", "corn", "door", "dream", "ear", "earth", "face", "farm", "field", "fire", "fish", "floor"),
    *("game", "glass", "gold", "hand", "heart", "hill", "horse", "house", "ice", "iron", "island", "king", "knife"),
    *("lake", "leaf", "light", "milk", "moon", "nose", "ocean", "paper", "plant", "queen", "rain", "river", "road"),
    *("salt", "ship", "snow", "stone", "table", "train", "water", "wind"),
)
SEEN = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol")
NEW = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")
SIDE, MARGIN = 112, 8  # pixels; a word at its edge would lose a part when it is turned
TRAIN, VALIDATION, TEST = 1600, 200, 300  # images, numbered in this order
FIRST = {"validation": TRAIN, "test": TRAIN + VALIDATION, "shifted": TRAIN + VALIDATION + TEST}


class Words:
    """Words of 60 in six fonts; the split "shifted" has Computer Modern, which training does not have."""

    name = "words"
    title = "words in print"
    shift = "fonts of another family"
    per_step = 16

    def images(self) -> tuple[Images, ...]:
        return (
            Images("words-seen-fonts", FIRST["shifted"], lambda i: draw(i, SEEN)),
            Images("words-new-fonts", TEST, lambda i: draw(FIRST["test"] + i, NEW)),
        )

    def rows(self, count: int, seed: int) -> list[Row]:
        return [{"image_id": i, "turns": [[QUESTION, word(i)]]} for i in taken(range(TRAIN), count, seed)]

    def questions(self, split: Split, count: int, seed: int) -> list[Question]:
        size = VALIDATION if split == "validation" else TEST
        first = FIRST["validation" if split == "validation" else "test"]
        return [
            {"image_id": FIRST[split] + i, "question": QUESTION, "answer": word(first + i), "kind": "word"}
            for i in taken(range(size), min(count, size), seed)
        ]

    def captions(self, split: Literal["train", "test"], count: int, seed: int) -> list[tuple[int, str]]:
        first, size = (0, TRAIN) if split == "train" else (FIRST["test"], TEST)
        return [(first + i, word(first + i)) for i in taken(range(size), count, seed)]


def word(number: int) -> str:
    """Return the word of an image."""
    return random.Random(f"word {number}").choice(WORDS)


def draw(number: int, fonts: tuple[str, ...]) -> Image.Image:
    """Draw an image's word in one of the fonts, 112 x 112, at a random size, place and slight angle."""
    generator = random.Random(f"place {number}")
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{generator.choice(fonts)}.ttf"
    font = ImageFont.truetype(str(file), generator.randint(18, 26))
    left, top, right, bottom = font.getbbox(word(number))
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    x = generator.uniform(MARGIN, SIDE - MARGIN - (right - left))
    y = generator.uniform(MARGIN, SIDE - MARGIN - (bottom - top))
    ImageDraw.Draw(canvas).text((x - left, y - top), word(number), fill="black", font=font)
    return canvas.rotate(generator.uniform(-5, 5), Image.Resampling.BICUBIC, fillcolor="white")
