"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from ..data.formats import COLUMNS

DATA = (
    "A JSON, JSONL or parquet file, a folder that `datasets` can load, or the name of a data set on the Hugging Face "
    "Hub."
)
Images = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder that holds the images, videos and sounds. BEGINNING=FOLDER is for paths that begin so. "
        "Repeatable. Default: the folder of the file."
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="For a table: the name of a column, as in --column question=query. To the left of = write question, "
        "answer, image, video, audio, id or options. Repeatable."
    ),
]
Prompt = Annotated[
    str | None, typer.Option(help="One question for all rows, for a table that has no column of questions.")
]
Name = Annotated[str | None, typer.Option(help="Configuration of a Hub data set, if it has several.")]
Device = Annotated[
    str | None, typer.Option(help="Device to run on, such as cpu or cuda:1. Default: the GPU, if there is one.")
]
SPLIT = "Split to read from a folder or a Hub data set."


def pairs(items: list[str], option: str) -> dict[str, str]:
    """Parse beginning=folder; a folder alone is for all other paths, under the key "".

    Raises:
        ValueError: `option` is --column, and `beginning` is not one of its keys.
    """
    mapping = {}
    for item in items:
        begin, equals, rest = item.partition("=")
        mapping[begin if equals else ""] = rest if equals else item
    unknown = [begin for begin in mapping if begin not in COLUMNS] if option == "--column" else []
    if unknown:
        given = "=".join(filter(None, (unknown[0], mapping[unknown[0]])))
        raise ValueError(
            f"--column {given}: expected question=NAME, where NAME is your column. To the left of = stands one of "
            f"{', '.join(COLUMNS)}."
        )
    return mapping
