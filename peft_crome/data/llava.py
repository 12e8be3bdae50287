"""Read the LLaVA format: a JSON list, or a row per line, of pictures and conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"


def read_llava(path: str | Path, images: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """Read and validate rows, one at a time.

    Args:
        path: a JSON list or JSONL of {"id", "image": path or list of paths, "conversations": [{"from", "value"}]}.
            A row without "image" is text alone; pictures that no `<image>` stands for come before the first turn.
        images: folder that image paths start from; None: the folder of `path`.
    Yields:
        id: text; images: list of absolute paths; messages: [{"role", "content"}], where a user's content is a list of
        {"type": "image"} and {"type": "text", "text"}.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row cannot be read; the message names the file, the row's id and what to write.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a JSON list or JSONL in the LLaVA format.")
    root = Path(images) if images is not None else path.parent
    for number, row in enumerate(_rows(path)):
        yield _checked(row, number, path, root)


def check_images(rows: Iterable[dict[str, Any]]) -> None:
    """See that every image file is there, before a run begins; none is opened.

    Raises:
        ValueError: names the first row whose file is missing, and how many there are.
    """
    missing = [(row["id"], path) for row in rows for path in row["images"] if not Path(path).is_file()]
    if missing:
        name, path = missing[0]
        raise ValueError(
            f"Row {name!r}: the image {path} is missing ({len(missing)} such files in all). Name the folder that "
            "image paths start from, or take these rows out."
        )


def _rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
            return
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}). A row per line needs the ending .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list of rows.")
    yield from rows


def _checked(row: Any, number: int, path: Path, root: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number}: {type(row).__name__} instead of an object with 'conversations'.")
    name = f"{path}, row {row.get('id', number)!r}"
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name}: 'conversations' is {turns!r}; expected [{{'from': 'human', 'value': '...'}}, ...].")
    given = row.get("image")
    given = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(image, str) and image for image in given):
        raise ValueError(f"{name}: 'image' is {row['image']!r}; expected a path or a list of paths.")
    messages = [_message(turn, name) for turn in turns]
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{name}: no turn is from 'gpt', so there is nothing to learn.")
    _place_images(messages, len(given), name)
    return {
        "id": str(row.get("id", number)),
        "images": [str(_inside(root, image, name)) for image in given],
        "messages": messages,
    }


def _message(turn: Any, name: str) -> dict[str, Any]:
    role = ROLES.get(turn.get("from") or turn.get("role") or "") if isinstance(turn, dict) else None
    value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if role is None or not isinstance(value, str):
        raise ValueError(f"{name}: the turn {turn!r} is none; expected {{'from': 'human' or 'gpt', 'value': text}}.")
    if role != "user" and PLACEHOLDER in value:
        raise ValueError(f"{name}: {PLACEHOLDER} stands in a turn from {role!r}. Only 'human' turns show images.")
    if role != "user":
        return {"role": role, "content": [{"type": "text", "text": value}]}
    content: list[dict[str, Any]] = []
    for part_number, text in enumerate(value.split(PLACEHOLDER)):
        content += [{"type": "image"}] if part_number else []
        content += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return {"role": role, "content": content}


def _place_images(messages: list[dict[str, Any]], given: int, name: str) -> None:
    """Put pictures without a placeholder before the first user's turn (LAMM); refuse other numbers."""
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed == given:
        return
    if placed:
        raise ValueError(f"{name}: {placed} {PLACEHOLDER} and {given} images. Write one {PLACEHOLDER} per image.")
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"{name}: no turn is from 'human', so there is no place for its {given} images.")
    first["content"][:0] = [{"type": "image"}] * given


def _inside(root: Path, image: str, name: str) -> Path:
    path = (root / image).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{name}: the image path {image!r} leaves {root}. Name the folder that holds all images.")
    return path
