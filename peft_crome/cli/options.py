"""Options of several commands, as they are read."""

from __future__ import annotations

IMAGES = "Folder that paths of images, videos and sounds start from, or BEGINNING=FOLDER. Repeatable."
COLUMN = "Column of a table: question=NAME, answer=, image=, video=, audio=, id= or options=NAME. Repeatable."


def pairs(items: list[str], option: str) -> dict[str, str]:
    """beginning=folder, or a folder for all the rest, under the key "".

    Raises:
        ValueError: `option` is --column, which has no rest.
    """
    mapping = {}
    for item in items:
        begin, equals, rest = item.partition("=")
        mapping[begin if equals else ""] = rest if equals else item
    if option == "--column" and "" in mapping:
        raise ValueError(f"--column {mapping['']!r}: expected question=NAME, answer=NAME, image=NAME or id=NAME.")
    return mapping
