"""Read rows of a file one at a time: JSON lists, JSONL, parquet. Memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow.parquet

from .rows import Fault

EXPECTED = "a JSON list, JSONL or parquet"
BOM = b"\xef\xbb\xbf"


def stream(path: Path) -> Iterator[Any]:
    """Read rows unchanged. Nothing after invalid JSON can be read, except in a file with one row per line.

    Yields:
        Values, with fractions as `Decimal`; a `Fault` in place of a row that is not JSON.
    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is neither JSON nor parquet, or is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected {EXPECTED}.")
    if path.suffix.lower() == ".csv":
        convert = f"pandas.read_csv({str(path)!r}).to_json({str(path.with_suffix('.jsonl'))!r}, "
        raise ValueError(
            f"{path} is CSV; expected {EXPECTED}. Convert it in Python: import pandas; "
            f"{convert}orient='records', lines=True)"
        )
    if path.suffix.lower() == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
        return
    with path.open("rb") as file:
        if file.read(3) != BOM:
            file.seek(0)
        start = file.tell()
        first = _first_character(file)
        file.seek(start)
        if first == b"[":
            yield from _list(file)
        elif first == b"{":
            yield from _lines(file, path)
        else:
            beginning = repr(first.decode(errors="replace")) if first else "nothing"
            raise ValueError(f"{path} begins with {beginning}; expected {EXPECTED}.")


def _first_character(file: BinaryIO) -> bytes:
    while (character := file.read(1)).isspace():
        pass
    return character


def _list(file: BinaryIO) -> Iterator[Any]:
    number = 0
    try:
        for row in ijson.items(file, "item"):
            number += 1
            yield row
    except (ijson.JSONError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())[:160]
        yield Fault("json", f"the file is not JSON after row {number} ({cause}); nothing that follows was read.")


def _lines(file: BinaryIO, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:  # errors of JSON and of UTF-8
            if number == 1 and line.strip() == b"{":
                raise ValueError(f"{path} holds one object; expected a list of rows, or a row per line.") from error
            yield Fault("json", f"line {number} is not JSON ({error}).")
