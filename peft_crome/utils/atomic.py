"""Write a file or a folder completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO
from uuid import uuid4


def beside(path: Path) -> Path:
    """Return an unused name in the same folder.

    `tempfile` is not used for files, since they would be readable only by their owner. Others may share the folder.
    """
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def is_unfinished(name: str, of: str) -> bool:
    """Whether a file's name comes from `beside`, for the file called `of`."""
    return name.startswith(f".{of}.") and name.endswith(".tmp")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which becomes `path` at the end of the block and replaces an existing file.

    If the block fails, the new file is removed and the old one stays.
    """
    temporary = beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `path` at the end of the block; `path` must be missing or empty.

    If the block fails, the folder is removed. Remains of a killed process are removed as well.
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
    """Yield an empty folder, whose files are moved into `directory` at the end of the block and replace older ones.

    If the block fails, `directory` is unchanged.
    """
    # The folder itself is readable only by its owner; files in it have the usual permissions.
    with TemporaryDirectory(dir=directory, prefix=".files.", suffix=".tmp", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
        for file in [path for path in Path(temporary).iterdir() if path.is_file()]:
            os.replace(file, directory / file.name)


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a file for text in UTF-8. It gets its name when it is complete, and is removed if writing fails.

    Characters that UTF-8 cannot encode are written as JSON escapes.

    Raises:
        FileExistsError: another process has created the file meanwhile. It stays; the message names the copy.
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
