"""The text of a turn that is given in parts: one rule for chat templates and for the rows of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")  # where a part holds its image


def turn_text(parts: Sequence[Mapping[str, Any]], image_token: str) -> str:
    """Join a turn's parts; nothing of their text is left out.

    An image stands on its own line beside text, as most vision-language prompts have it. An image part with "text": ""
    stands in the text as it is; so a row keeps the place of an image that its text itself shows.

    Args:
        parts: {"type": "text", "text"}; any other type is an image.
        image_token: what stands for an image.

    Example:
        >>> question = {"type": "text", "text": " is what?"}
        >>> turn_text([{"type": "image"}, question], "<image>")
        '<image>\\n is what?'
        >>> turn_text([{"type": "image", "text": ""}, question], "<image>")
        '<image> is what?'
    """
    text, loose = "", False
    for part in parts:
        is_image = part["type"] != "text"
        piece = image_token if is_image else part["text"]
        in_text = is_image and part.get("text") == ""
        meet = text.endswith(image_token) != piece.startswith(image_token)
        own_line = text and piece and meet and not (loose or in_text or text.endswith("\n"))
        text += f"\n{piece}" if own_line else piece
        loose = in_text if piece else loose
    return text
