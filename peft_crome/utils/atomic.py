"""Write a file or a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
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


def is_unfinished(name: str, of: str) -> bool:
    """Whether a file's name is one of `beside`, for the file that is called `of`."""
    return name.startswith(f".{of}.") and name.endswith(".tmp")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end of the block; a file that is there is replaced.

    Where the block fails, nothing is left of it, and the file that was there stays.
    """
    temporary = beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `path` at the end of the block; that is missing, or empty.

    Where the block fails, nothing is left of it. What a killed process left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def moved_into(directory: Path) -> Iterator[Path]:
    """An empty folder to write to, whose files are moved into `directory` at the end of the block, over older ones.

    Where the block fails, `directory` is as it was.
    """
    temporary = beside(directory / "files")
    temporary.mkdir()
    try:
        yield temporary
        for file in [path for path in temporary.iterdir() if path.is_file()]:
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
            f"{path} was made by another process meanwhile. It stays as it is, and the new content is in {temporary}."
        )
    os.replace(temporary, path)
