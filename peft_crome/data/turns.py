"""A turn of a conversation as a message: who says it, its text, and the images that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.shorten import short
from ..utils.turn_text import turn_text
from .fields import unread_of_turn
from .placeholders import OF_ONE_IMAGE, PLACEHOLDER, own_image, shown_in
from .rows import Fault, is_unicode

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def role_of(turn: Mapping[str, Any]) -> Any:
    """Who a turn says that it is from."""
    return first_of(turn, "from", "role")


def value_of(turn: Mapping[str, Any]) -> Any:
    """What a turn says: text, or a list of parts."""
    return first_of(turn, "value", "content")


def own_images(turn: Any) -> int:
    """How many images a turn holds itself, which are none of the row's."""
    return sum(image is not None for image in read_turn(turn)[1])


def first_of(given: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that is not null: a table of two forms has columns for both, and nulls in the others."""
    for key in keys:  # every turn comes here, and next() takes twice as long
        if given.get(key) is not None:
            return given[key]
    return None


def said_by(turn: Any) -> tuple[Any, Any]:
    """A turn's role and what it says."""
    if not isinstance(turn, Mapping):
        return None, turn
    role = role_of(turn)
    return (ROLES.get(role) if isinstance(role, str) else None), value_of(turn)


def read_turn(turn: Any, before: Sequence[Any] | None = None) -> tuple[dict[str, Any] | None, list[Any], list[Fault]]:
    """A turn as a message, the image that each of its places holds itself or None, and what is wrong with it.

    Args:
        turn: of a row.
        before: the same of the places in earlier turns; None: the row has no images, or they are not asked for.
    """
    role, value = said_by(turn)
    if role is None or not isinstance(value, str | list):
        expected = "{'from': 'human' or 'gpt', 'value': text} or {'role': 'user' or 'assistant', 'content': ...}"
        return None, [], [Fault("turn", f"{short(turn)} is no turn; expected {expected}.")]
    wrong = unread_of_turn(turn)
    if wrong is not None:
        return None, [], [wrong]
    if isinstance(value, str):
        value, images = shown_in(value, None if before is None else len(before))
    else:
        found = _parts(value, before)
        if isinstance(found, Fault):
            return None, [], [found]
        value, images = found
    if not is_unicode(value):
        return None, [], [_half_a_character(turn)]
    if images and role != "user":
        message = f"an image stands in a turn from {role_of(turn)!r}. Only the user's turns ('human') show images."
        return None, [], [Fault("placeholder", message)]
    return {"role": role, "content": _split(value)}, images, []


def answer_text(given: Any) -> str | None:
    """The text of an answer, given as text, as a turn, or as turns that end with it; None: it is nothing of these."""
    turn = given[-1] if isinstance(given, list) and given else given
    message, _, faults = read_turn({"role": "assistant", "content": given} if isinstance(given, str) else turn)
    if faults or message is None or message["role"] != "assistant":
        return None
    return turn_text(message["content"], PLACEHOLDER)


def _parts(value: list[Any], before: Sequence[Any] | None) -> tuple[str, list[Any]] | Fault:
    """The text of a turn that comes in parts, and the image that each place for one holds itself or None."""
    parts: list[dict[str, Any]] = []
    images: list[Any] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        own = own_image(part) if kind is not None else None
        if kind == "text" and isinstance(part.get("text"), str) and own is None:
            text, shown = shown_in(part["text"], None if before is None else len(before) + len(images))
            parts.append({"type": "text", "text": text})
            images += shown
        elif kind in ("image", "image_url") and not part.get("text"):
            given = part.get("index")
            following = None if before is None else [*before, *images].count(None)
            if own is None and given is not None and given != following is not None:
                wrong = f"an image has 'index': {short(given)}, and is number {following} of those that turns show"
                return Fault("placeholder", f"{wrong}. Order the row's images as its turns show them.")
            parts.append({"type": "image", "text": part.get("text")})
            images.append(own)
        else:
            expected = "{'type': 'text', 'text': ...} or {'type': 'image'}"
            return Fault("turn", f"{short(part)} is no part of a turn; expected {expected}.")
    return turn_text(parts, PLACEHOLDER), images


def place_by_others(messages: list[dict[str, Any]], given: int) -> None:
    """Read another model's placeholder as `<image>`, where no image has a place and there are as many as images."""
    users = [message for message in messages if message["role"] == "user"]
    texts = [turn_text(message["content"], PLACEHOLDER) for message in users]
    found = [mark.group() for text in texts for mark in OF_ONE_IMAGE.finditer(text)]
    if len(found) == given and len(set(found)) == 1:
        for message, text in zip(users, texts, strict=True):
            message["content"] = _split(OF_ONE_IMAGE.sub(PLACEHOLDER, text))


def _half_a_character(turn: Any) -> Fault:
    return Fault("turn", f"{short(turn)} holds half a character (a lone surrogate). Mend the text.")


def _split(text: str) -> list[dict[str, Any]]:
    """A turn's text in parts, of which `turn_text` makes the same text again."""
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}] if text else []
    pieces = text.split(PLACEHOLDER)
    lines = [piece.removeprefix("\n") if number else piece for number, piece in enumerate(pieces)]
    lines = [piece.removesuffix("\n") for piece in lines[:-1]] + lines[-1:]
    parts = _between({"type": "image"}, lines)
    if turn_text(parts, PLACEHOLDER) == text:
        return parts
    return _between({"type": "image", "text": ""}, pieces)  # an image within a line


def _between(image: dict[str, Any], pieces: list[str]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{**image}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
