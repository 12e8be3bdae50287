"""Write a file whole or not at all, and over none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from uuid import uuid4


def beside(path: Path) -> Path:
    """A name that nobody has, in the same folder.

    Not by `tempfile`, whose files are their owner's alone: others may share the folder.
    """
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a file for text in UTF-8; it has its name when it is whole, and is gone where writing it failed.

    What UTF-8 cannot hold is written as the escape that it is in JSON.

    Raises:
        FileExistsError: another file has come to that place meanwhile. It stays; the message says where this one is.
    """
    temporary = beside(path)
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            yield file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if path.exists():
        raise FileExistsError(
            f"{path} was not there before and is now. It stays; what was to be in it is {temporary}."
        )
    os.replace(temporary, path)
