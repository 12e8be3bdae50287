"""What stands for an image in the text of a turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..utils.turn_text import IMAGE_KEYS
from .fields import is_nothing
from .rows import Fault

PLACEHOLDER = "<image>"
ANY_CASE = re.compile(PLACEHOLDER, re.IGNORECASE)
WITH_PATH = re.compile(r"<image>|<img>\s*([^<>]*?)\s*</img>", re.IGNORECASE)  # Qwen-VL's
NUMBERED = re.compile(r"<(?:image|img)[ _-]?(\d+)>|<\|image_(\d+)\|>", re.IGNORECASE)  # MMMU's, Phi-3's
MEDIA = re.compile(
    # not HTML, and not words about it
    r"(?<!`)<(video|audio|speech)>(?!`|\s+(tag|element)|\s*</?(?!image|video|audio)\w)"
    r"|<\|\w*(image|img|vision|video|audio)\w*\|>"
    r"|(?<!`)<img>\s*[^\s<>]+\.(png|jpe?g|gif|webp|bmp|tiff?)\b",  # Qwen-VL's without its end
    re.IGNORECASE,
)
OF_OTHERS = re.compile(
    r"<(image|img)([ _-]?\d+)?>|<image_?here>|<image[_-](placeholder|token|pad)>|<start_of_image>", re.IGNORECASE
)  # words, where a row has no image


OF_ONE_IMAGE = re.compile(
    r"<image_?here>|<image[_-](placeholder|token|pad)>|<start_of_image>|<\|image(_pad|_token|_placeholder)?\|>",
    re.IGNORECASE,
)  # each stands for an image where there are as many


def shown_in(text: str, before: int | None = None) -> tuple[str, list[Any]]:
    """A text with `<image>` where it shows an image, and for each the path that stands there, or None.

    Args:
        text: of a turn, or of a part of one.
        before: images shown before it; None: the row has none, or the turn shows none. Numbered places that go on
            from it are images, and `<image>` is read in any case.
    """
    if before is not None and "<" in text:
        text = ANY_CASE.sub(PLACEHOLDER, text)
    if before is not None and "<" in text and PLACEHOLDER not in text:
        numbers = [int(found.group(1) or found.group(2)) for found in NUMBERED.finditer(text)]
        if numbers == list(range(before + 1, before + 1 + len(numbers))):
            text = NUMBERED.sub(PLACEHOLDER, text)
    if "</img>" not in text.lower():
        return text, [None] * text.count(PLACEHOLDER)
    images = [found.group(1) for found in WITH_PATH.finditer(text)]
    return WITH_PATH.sub(PLACEHOLDER, text), images


def own_image(part: Mapping[str, Any]) -> Any:
    """The image that a part of a turn holds itself; None: it stands for the next one of the row."""
    return next((part[key] for key in IMAGE_KEYS if not is_nothing(part.get(key))), None)


def foreign_placeholder(message: Mapping[str, Any], has_images: bool) -> Fault | None:
    """A placeholder of another model's data in what the user says."""
    if message["role"] != "user":
        return None
    for part in message["content"]:
        text = part["text"] if part["type"] == "text" else ""
        if "<" not in text:
            continue
        found = MEDIA.search(text) or (OF_OTHERS.search(text) if has_images else None)
        if found:
            wrong = f"{found.group()} in a turn of the user is not read. Write {PLACEHOLDER} where an image stands"
            return Fault("placeholder", f"{wrong}; videos and sound cannot be read.")
    return None
