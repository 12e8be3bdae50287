"""Read placeholders of images, videos and sounds in the text of a turn."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..utils.turn_text import IMAGE_KEYS
from .fields import is_nothing
from .media import FIELDS
from .rows import Fault

Place = tuple[str, Any]  # kind of a medium, and the medium; None: the row's next one
MARKS = {kind: f"<{kind}>" for kind in FIELDS}
PLACEHOLDER = MARKS["image"]
ANY_CASE = {kind: re.compile(mark, re.IGNORECASE) for kind, mark in MARKS.items()}
SHOWN = re.compile(
    r"<(?P<kind>image|video|audio)>|<(?i:img)>\s*(?P<path>[^<>]*?)\s*</(?i:img)>"
)  # the latter is from Qwen-VL
NUMBERED = re.compile(r"<(?:image|img)[ _-]?(\d+)>|<\|image_(\d+)\|>", re.IGNORECASE)  # from MMMU and Phi-3
MEDIA = re.compile(
    # neither HTML nor words about it
    r"(?<!`)<(video|audio|speech)>(?!`|\s+(tag|element)|\s*</?(?!image|video|audio)\w)"
    r"|<\|\w*(image|img|vision|video|audio)\w*\|>"
    r"|(?<!`)<img>\s*[^\s<>]+\.(png|jpe?g|gif|webp|bmp|tiff?)\b",  # Qwen-VL without its end
    re.IGNORECASE,
)
OF_OTHERS = re.compile(
    r"<(image|img)([ _-]?\d+)?>|<image_?here>|<image[_-](placeholder|token|pad)>|<start_of_image>", re.IGNORECASE
)  # plain words if a row has no image


OF_ONE_IMAGE = re.compile(
    r"<image_?here>|<image[_-](placeholder|token|pad)>|<start_of_image>|<\|image(_pad|_token|_placeholder)?\|>",
    re.IGNORECASE,
)  # each is an image if there are as many images


def shown_in(text: str, kinds: Collection[str] = (), before: int = 0) -> tuple[str, list[Place]]:
    """Mark media in a text by `<image>`, `<video>` or `<audio>`, and list the medium at each of these places.

    Args:
        text: text of a turn, or of a part of one.
        kinds: kinds that the row has in separate fields. Numbered placeholders that continue after `before` are images
            then, and placeholders are read in any case. In a row of videos without an image `<image>` is a video, as
            in LLaVA-Video's data. Other text in brackets stays text.
        before: number of images shown earlier.
    """
    if "<" not in text:
        return text, []
    for kind in kinds:
        text = ANY_CASE[kind].sub(MARKS[kind], text)
    if "image" not in kinds and "video" in kinds:
        text = text.replace(PLACEHOLDER, MARKS["video"])
    elif "image" in kinds and PLACEHOLDER not in text:
        numbers = [int(match.group(1) or match.group(2)) for match in NUMBERED.finditer(text)]
        if numbers == list(range(before + 1, before + 1 + len(numbers))):
            text = NUMBERED.sub(PLACEHOLDER, text)
    places: list[Place] = []

    def mark(match: re.Match[str]) -> str:
        kind = match["kind"] or "image"
        if kind != "image" and kind not in kinds:
            return match.group()
        places.append((kind, match["path"]))
        return MARKS[kind]

    return SHOWN.sub(mark, text), places


def own_medium(part: Mapping[str, Any], kind: str) -> Any:
    """Return the medium that a part of a turn holds; None: the part stands for the row's next one."""
    keys = (kind, *(key for key in IMAGE_KEYS if "image" not in key), f"{kind}_url")
    return next((part[key] for key in keys if not is_nothing(part.get(key))), None)


def foreign_placeholder(message: Mapping[str, Any], has_images: bool) -> Fault | None:
    """Find a placeholder of another model's data in the user's text."""
    if message["role"] != "user":
        return None
    for part in message["content"]:
        text = part["text"] if part["type"] == "text" else ""
        if "<" not in text:
            continue
        match = MEDIA.search(text) or (OF_OTHERS.search(text) if has_images else None)
        if match:
            marks = " or ".join(MARKS.values())
            wrong = f"{match.group()} in a turn of the user is not read. Write {marks} where one of the row's stands."
            return Fault("placeholder", wrong)
    return None
