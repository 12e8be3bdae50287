"""Find the fields of a row that hold its images, videos, sounds and system message, and those that are not read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from ..utils.read_image import SOURCES, embedded_image
from ..utils.shorten import short
from .rows import Fault

TURNS = ("conversations", "messages", "prompt")
SYSTEM = ("system", "system_prompt", "system_message")
READ = {"id", *TURNS, "completion", "chosen", "rejected", *SYSTEM, "answers", "options", "choices"}
OF_TURN = {"from", "role", "value", "content"}
KINDS = r"(_(file|filename|path|name|url|uri|base64|bytes|data)s?)?"
MEDIA = {
    "image": re.compile(rf"(image|img|picture|photo)s?{KINDS}", re.IGNORECASE),
    "video": re.compile(rf"videos?{KINDS}", re.IGNORECASE),
    "audio": re.compile(rf"(audio|speech)s?{KINDS}", re.IGNORECASE),
}
ADDRESSES = re.compile(r".*_(url|uri)s?", re.IGNORECASE)
WRITTEN = ("tools", "functions", "chat_template_kwargs")  # fields that a chat template would write
CALLS_AND_REASONING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss", "train")  # fields of a turn: whether it is learned
STILL = "png|jpe?g|webp|bmp|tiff?|avif"
STILL_FILE = re.compile(rf"[^\n]+\.({STILL})", re.IGNORECASE)
STILL_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*")  # JPEG, PNG, BMP, TIFF
IMAGE_FILE = re.compile(rf"[^\n]+\.({STILL}|gif)", re.IGNORECASE)


def is_nothing(value: Any) -> bool:
    """Whether a field is empty."""
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)


def source_of(medium: Any) -> Any:
    """Return a medium, or the first value of a mapping that is not empty; None: it has none."""
    if not isinstance(medium, Mapping):
        return medium
    return next((medium[key] for key in SOURCES if not is_nothing(medium.get(key))), None)


def media_fields(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Find the fields that hold a row's media, by kind. Kinds without a field are left out.

    `image` and `images` come first, and likewise for other kinds. An address counts if no other field has a medium.
    """
    fields: dict[str, list[str]] = {}
    for key, value in row.items():
        kind = _kind(key) if isinstance(key, str) else None
        if kind is not None and not is_nothing(value) and (key in (kind, f"{kind}s") or _holds_files(value)):
            fields.setdefault(kind, []).append(key)
    for kind, named in fields.items():
        named.sort(key=lambda key: (key != kind, key != f"{kind}s"))
        fields[kind] = [key for key in named if not ADDRESSES.fullmatch(key)] or named
    return fields


@lru_cache(1024)
def _kind(key: str) -> str | None:
    """Return the kind of media that a field of this name may hold."""
    return next((kind for kind, names in MEDIA.items() if names.fullmatch(key)), None)


def are_alike(media: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two fields hold the same media: equal values, files of the same name, or a file and its content."""
    return len(media) == len(others) and all(
        one == other
        or _file_name(one) == _file_name(other) != ""
        or (_file_name(one) == "") != (_file_name(other) == "")
        for one, other in zip(media, others, strict=True)
    )


def is_a_list_of_media(value: Any, kind: str) -> bool:
    """Whether a field holds a list of media. A list of nothing but image files is the frames of one video."""
    return isinstance(value, list) and not (kind == "video" and value and all(map(_is_an_image_file, value)))


def _is_an_image_file(value: Any) -> bool:
    """Whether a file is a still image, by its name, or by its first bytes if it has no name."""
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, Mapping) else (value, None)
    if isinstance(path, str) and PurePosixPath(path).suffix:
        return STILL_FILE.fullmatch(path) is not None
    return isinstance(path, Image.Image) or (isinstance(content, bytes) and content.startswith(STILL_BYTES))


def system_of(row: Mapping[str, Any]) -> tuple[str | None, list[Fault]]:
    """Read the system message beside the turns of a row."""
    fields = {key: row[key] for key in SYSTEM if row.get(key)}
    texts = [text for text in fields.values() if isinstance(text, str)]
    if len(texts) < len(fields):
        return None, [Fault("row", f"the system message is {short(fields)}; expected text.")]
    if len(set(texts)) > 1:
        return None, [Fault("row", f"{list(fields)} are different system messages. Take one of them out.")]
    return (texts[0] if texts and not texts[0].isspace() else None), []


def unread_content(row: Mapping[str, Any], fields: Mapping[str, list[str]], has_images: bool) -> list[Fault]:
    """Find content of a row that nothing reads. Such a row is not trained on.

    Args:
        fields: fields that hold its media, from `media_fields`.
        has_images: whether the row has images elsewhere.
    """
    keys = [key for key, value in row.items() if isinstance(key, str) and not is_nothing(value)]
    written = [key for key in keys if key in WRITTEN]
    unnamed = [
        key
        for key in keys
        if key not in READ and key != "turns" and _kind(key) is None and _is_an_image(row[key], has_images)
    ]
    of_media = [key for key in keys if _kind(key) in ("video", "audio") and not ADDRESSES.fullmatch(key)]
    empty = [key for key in of_media if key not in fields.get(str(_kind(key)), ())]
    found = (
        (empty, "hold no files. Write paths or bytes into 'videos' or 'audio', or take the field out."),
        (written, "cannot be read; write what the model is to read of it into the turns."),
        (unnamed, "hold images, which are read from 'image' or 'images'. Rename the field, or take it out."),
    )
    return [Fault("row", f"{names} {wrong}") for names, wrong in found if names]


def unread_of_turn(turn: Mapping[str, Any]) -> Fault | None:
    """Find content of a turn beside its text that nothing reads."""
    if len(turn) <= 2:
        return None
    fields = {key: value for key, value in turn.items() if isinstance(key, str) and not is_nothing(value)}
    unread = [key for key in fields if key in CALLS_AND_REASONING or _kind(key)]
    if unread:
        remedy = "List files in the row's 'images', 'videos' or 'audio', and write the rest into the text."
        return Fault("turn", f"a turn has {unread} of its own, which are not read. {remedy}")
    if "value" in fields and fields.get("content", fields["value"]) != fields["value"]:
        return Fault("turn", "a turn has 'value' and 'content', which differ. Take one of them out.")
    weights = [key for key in WEIGHTS if key in fields and fields[key] != 1]
    if weights:
        return Fault(
            "turn", f"a turn has {weights[0]!r}: {short(fields[weights[0]])}. All answers of a row are learned."
        )
    return None


def ignored_fields(row: Any, columns: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the names of a row's fields that are not read; fields of its turns as `conversations[].name`."""
    if not isinstance(row, Mapping):
        return
    read = READ.union(*media_fields(row).values()) if columns is None else set(columns.values())
    if columns is None and not isinstance(row.get("prompt"), list):
        read -= {"prompt", "completion"}
    yield from (str(key) for key, value in row.items() if key not in read and not is_nothing(value))
    for key in TURNS if columns is None else ():
        turns = row[key] if isinstance(row.get(key), list) else []
        names = {name for turn in turns if isinstance(turn, Mapping) for name in turn}
        yield from (f"{key}[].{name}" for name in sorted(map(str, names - OF_TURN)))


def _holds_files(value: Any) -> bool:
    items = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    return any(not is_nothing(item) for item in items) and all(
        isinstance(item, str | bytes | Image.Image) or (isinstance(item, Mapping) and source_of(item) is not None)
        for item in items
    )


def _is_an_image(value: Any, has_images: bool) -> bool:
    """Whether a field of any name holds an image, or names an image file in a row without other images."""
    for item in value if isinstance(value, list) else [value]:
        source = source_of(item)
        if isinstance(source, bytes | Image.Image):
            return True
        if not isinstance(source, str):
            return False
        embedded = source[:11].lower() == "data:image/" or embedded_image(source) is not None
        if not embedded and (has_images or not IMAGE_FILE.fullmatch(source)):
            return False
    return not is_nothing(value)


def _file_name(image: Any) -> str:
    """Return the name of an image's file without its suffix; empty if the image is given by its content."""
    if isinstance(image, Mapping):
        image = image.get("path") or image.get("url")
    if not isinstance(image, str) or image[:5].lower() == "data:" or embedded_image(image) is not None:
        return ""
    return PurePosixPath(image).stem
