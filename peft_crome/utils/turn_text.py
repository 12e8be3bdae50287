"""Join the parts of a turn to a text, by one rule for chat templates and for the rows of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")  # keys of a part that may hold its image


def turn_text(parts: Sequence[Mapping[str, Any]], marks: Mapping[str, str]) -> str:
    """Join a turn's parts without losing any text.

    An image is on a separate line beside text, as in most vision-language prompts, and so are videos and sounds.
    An image part with "text": "" stays within the line, so a row keeps the place of an image that its text
    shows.

    Args:
        parts: {"type": "text", "text"}, or {"type": one of marks}.
        marks: type of a part -> its mark in the text.

    Example:
        >>> question = {"type": "text", "text": " is what?"}
        >>> turn_text([{"type": "image"}, question], {"image": "<image>"})
        '<image>\\n is what?'
        >>> turn_text([{"type": "image", "text": ""}, question], {"image": "<image>"})
        '<image> is what?'
    """
    text, loose, edges = "", False, tuple(marks.values())
    for part in parts:
        is_mark = part["type"] != "text"
        piece = marks[part["type"]] if is_mark else part["text"]
        in_text = is_mark and part.get("text") == ""
        meet = text.endswith(edges) != piece.startswith(edges)
        own_line = text and piece and meet and not (loose or in_text or text.endswith("\n"))
        text += f"\n{piece}" if own_line else piece
        loose = in_text if piece else loose
    return text
