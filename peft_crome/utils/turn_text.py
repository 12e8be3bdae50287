"""The text of a turn that is given in parts: one rule for chat templates and for the rows of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")  # where a part holds its image


def turn_text(parts: Sequence[Mapping[str, Any]], marks: Mapping[str, str]) -> str:
    """Join a turn's parts; nothing of their text is left out.

    An image stands on its own line beside text, as most vision-language prompts have it, and so do videos and sounds.
    An image part with "text": "" stands in the text as it is; so a row keeps the place of an image that its text
    itself shows.

    Args:
        parts: {"type": "text", "text"}, or {"type": one of marks}.
        marks: type of a part -> what stands for it.

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
