"""Options that several commands share."""

from __future__ import annotations

IMAGES = "Folder that paths of images, videos and sounds start from, or BEGINNING=FOLDER. Repeatable."
COLUMN = "Column of a table: question=NAME, answer=, image=, video=, audio=, id= or options=NAME. Repeatable."


def pairs(items: list[str], option: str) -> dict[str, str]:
    """Parse beginning=folder; a folder alone is for all other paths, under the key "".

    Raises:
        ValueError: `option` is --column, which has no such default.
    """
    mapping = {}
    for item in items:
        begin, equals, rest = item.partition("=")
        mapping[begin if equals else ""] = rest if equals else item
    if option == "--column" and "" in mapping:
        raise ValueError(f"--column {mapping['']!r}: expected question=NAME, answer=NAME, image=NAME or id=NAME.")
    return mapping
