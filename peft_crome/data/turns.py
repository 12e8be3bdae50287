"""Read a turn of a conversation as a message: its role, its text, and the images, videos and sounds that it shows."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..utils.shorten import short
from ..utils.turn_text import turn_text
from .fields import unread_of_turn
from .media import FIELDS, NOUNS
from .placeholders import MARKS, OF_ONE_IMAGE, PLACEHOLDER, Place, own_medium, shown_in
from .rows import Fault, is_unicode

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def role_of(turn: Mapping[str, Any]) -> Any:
    """Return the role in a turn, under any of its names."""
    return first_of(turn, "from", "role")


def own_media(turn: Any, kind: str) -> int:
    """Count the media of a kind inside a turn, which are not listed in the row."""
    return sum(shown == kind and medium is not None for shown, medium in read_turn(turn)[1])


def first_of(fields: Mapping[str, Any], *keys: str) -> Any:
    """Return the first value that is not null. A table of two forms has columns for both, with nulls."""
    for key in keys:  # next() takes twice as long, and every turn needs this
        if fields.get(key) is not None:
            return fields[key]
    return None


def said_by(turn: Any) -> tuple[Any, Any]:
    """Return a turn's role and its content, which is text or a list of parts."""
    if not isinstance(turn, Mapping):
        return None, turn
    role = role_of(turn)
    return (ROLES.get(role) if isinstance(role, str) else None), first_of(turn, "value", "content")


def read_turn(
    turn: Any, kinds: Collection[str] = (), before: Sequence[Place] = ()
) -> tuple[dict[str, Any] | None, list[Place], list[Fault]]:
    """Convert a turn to a message; also return the medium at each of its places, and its faults.

    Args:
        turn: turn of a row.
        kinds: kinds that the row has in separate fields.
        before: media at the places in earlier turns.
    """
    role, value = said_by(turn)
    if role is None or not isinstance(value, str | list):
        expected = "{'from': 'human' or 'gpt', 'value': text} or {'role': 'user' or 'assistant', 'content': ...}"
        return None, [], [Fault("turn", f"{short(turn)} is not a turn; expected {expected}.")]
    unread = unread_of_turn(turn)
    if unread is not None:
        return None, [], [unread]
    if isinstance(value, str):
        value, places = shown_in(value, kinds, _count(before, "image"))
    else:
        result = _parts(value, kinds, before)
        if isinstance(result, Fault):
            return None, [], [result]
        value, places = result
    if not is_unicode(value):
        wrong = f"{short(turn)} holds half a character (a lone surrogate). Correct the text."
        return None, [], [Fault("turn", wrong)]
    if places and role != "user":
        noun = NOUNS[places[0][0]]
        wrong = f"{'an' if noun == 'image' else 'a'} {noun} stands in a turn from {role_of(turn)!r}."
        return None, [], [Fault("placeholder", f"{wrong} Only the user's turns ('human') show {noun}s.")]
    return {"role": role, "content": _split(value, {kind for kind, _ in places} if places else ())}, places, []


def answer_text(answer: Any) -> str | None:
    """Return the text of an answer: a text, a turn, or turns that end with the answer; None for anything else."""
    turn = answer[-1] if isinstance(answer, list) and answer else answer
    message, _, faults = read_turn({"role": "assistant", "content": answer} if isinstance(answer, str) else turn)
    if faults or message is None or message["role"] != "assistant":
        return None
    return turn_text(message["content"], MARKS)


def _count(places: Sequence[Place], kind: str) -> int:
    return sum(shown == kind for shown, _ in places)


def _parts(value: list[Any], kinds: Collection[str], before: Sequence[Place]) -> tuple[str, list[Place]] | Fault:
    """Join the text of a turn that is a list of parts; also return the medium at each of its places."""
    parts: list[dict[str, Any]] = []
    places: list[Place] = []
    types = [part.get("type") if isinstance(part, dict) else None for part in value]
    marked = {*kinds, *(kind for kind in types if kind in ("video", "audio"))}
    for part, named in zip(value, types, strict=True):
        kind = "image" if named == "image_url" else named
        if kind == "text" and isinstance(part.get("text"), str) and own_medium(part, "image") is None:
            text, shown = shown_in(part["text"], marked, _count([*before, *places], "image"))
            parts.append({"type": "text", "text": text})
            places += shown
        elif kind in FIELDS and not part.get("text"):
            medium = own_medium(part, kind)
            index, following = part.get("index"), [*before, *places].count((kind, None))
            if medium is None and index is not None and kind in kinds and index != following:
                wrong = f"an image has 'index': {short(index)}, and is number {following} of those that turns show"
                return Fault("placeholder", f"{wrong}. Order the row's images as its turns show them.")
            parts.append({"type": kind, "text": part.get("text")})
            places.append((kind, medium))
        else:
            expected = "{'type': 'text', 'text': ...}, or 'image', 'video' or 'audio' as the type"
            return Fault("turn", f"{short(part)} is not a part of a turn; expected {expected}.")
    return turn_text(parts, MARKS), places


def place_by_others(messages: list[dict[str, Any]], count: int) -> None:
    """Read another model's placeholder as `<image>`, if no image has a place and their numbers agree."""
    users = [message for message in messages if message["role"] == "user"]
    texts = [turn_text(message["content"], MARKS) for message in users]
    marks = [mark.group() for text in texts for mark in OF_ONE_IMAGE.finditer(text)]
    if len(marks) == count and len(set(marks)) == 1:
        for message, text in zip(users, texts, strict=True):
            kinds = {"image", *(part["type"] for part in message["content"] if part["type"] != "text")}
            message["content"] = _split(OF_ONE_IMAGE.sub(PLACEHOLDER, text), kinds)


def _split(text: str, kinds: Collection[str]) -> list[dict[str, Any]]:
    """Split a turn's text into parts, from which `turn_text` makes the same text again.

    Args:
        kinds: kinds whose marks stand for media of the turn.
    """
    if not kinds:
        return [{"type": "text", "text": text}] if text else []
    pieces = re.split(f"({'|'.join(MARKS[kind] for kind in kinds)})", text)  # texts, and marks between them
    lines = [piece.removeprefix("\n") if number else piece for number, piece in enumerate(pieces)]
    lines = [piece.removesuffix("\n") for piece in lines[:-1]] + lines[-1:]
    parts = _as_parts(lines, {})
    return parts if turn_text(parts, MARKS) == text else _as_parts(pieces, {"text": ""})  # an image within a line


def _as_parts(pieces: list[str], of_medium: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"type": piece[1:-1], **of_medium} if number % 2 else {"type": "text", "text": piece}
        for number, piece in enumerate(pieces)
        if piece
    ]
