"""Handle the images, videos and sounds of a row by kind."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..utils.shorten import cut, short

FIELDS = {"image": "images", "video": "videos", "audio": "audio"}  # the type of a message's part -> the row's field
NOUNS = {"image": "image", "video": "video", "audio": "sound"}


def media_of(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the media of a row by kind. Kinds without a medium are left out."""
    return {kind: list(row[field]) for kind, field in FIELDS.items() if row.get(field)}


def kinds_of(messages: list[dict[str, Any]]) -> list[str]:
    """List the kind of each medium that messages show, in the order of their parts."""
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return [part["type"] for content in contents for part in content if part["type"] in FIELDS]


def with_media(messages: list[dict[str, Any]], media: Mapping[str, Iterator[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put media into the parts of a conversation that show them.

    Args:
        media: kind -> entries for its parts, in their order, from `MediaReader.read`.
    """
    return [
        {
            **message,
            "content": [
                {**part, **next(media[part["type"]])} if part["type"] in FIELDS else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def file_of(medium: Any) -> str | io.BytesIO:
    """Return the path or an open file of a row's video or sound.

    Args:
        medium: a path, or {"path", "bytes"} as `datasets` keeps files.
    Raises:
        ValueError: there is no file at the path.
    """
    if isinstance(medium, Mapping) and medium.get("bytes") is not None:
        return io.BytesIO(medium["bytes"])
    path = str(medium["path"] if isinstance(medium, Mapping) else medium)
    if not os.path.isfile(path):
        raise ValueError("the file does not exist")
    return path


@contextmanager
def naming(name: str, kind: str, medium: Any) -> Iterator[None]:
    """Turn a decoder's error into a `ValueError` that names the row and the file.

    A missing package stays an `ImportError`.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # each decoder raises its own errors
        path = medium.get("path") if isinstance(medium, Mapping) else medium
        described = cut(str(path)) if path else short(medium)
        cause = cut(str(error) or type(error).__name__, 200)
        raise ValueError(
            f"{name}: cannot read the {NOUNS[kind]} {described} ({cause}). Replace the file or drop the row."
        ) from error
