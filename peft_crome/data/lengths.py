"""Estimate the lengths of rows without a tokenizer and without opening a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

CHARACTERS_PER_TOKEN = 4  # in English; only the order of the lengths matters


def row_lengths(rows: Any, image_seq_length: int) -> list[int]:
    """Estimate the tokens of each row from its characters and images. A video or a sound counts as an image.

    Args:
        rows: `datasets.Dataset` of `load_rows`, or a list of such rows. Images inside the table are not read.
        image_seq_length: tokens of an image.
    """
    if not isinstance(rows, Dataset):
        return [_length(rows[number], image_seq_length) for number in range(len(rows))]
    lengths: list[int] = []
    for batch in rows.select_columns(["messages"]).with_format("arrow").iter(batch_size=1000):
        parts, row_of_part = parts_of(batch)
        characters = np.asarray(pc.fill_null(pc.utf8_length(pc.struct_field(parts, "text")), 0))
        images = np.asarray(pc.not_equal(pc.struct_field(parts, "type"), "text")).astype(np.int64)
        tokens = characters / CHARACTERS_PER_TOKEN + images * image_seq_length
        lengths += np.bincount(row_of_part, weights=tokens, minlength=len(batch)).astype(int).tolist()
    return lengths


def parts_of(batch: pa.Table) -> tuple[pa.Array, np.ndarray]:
    """Return the parts of all messages in a batch of rows, and the row number of each part."""
    messages = batch["messages"].combine_chunks()
    contents = pc.struct_field(pc.list_flatten(messages), "content")
    row_of_part = np.asarray(pc.list_parent_indices(messages))[np.asarray(pc.list_parent_indices(contents))]
    return pc.list_flatten(contents), row_of_part


def _length(row: dict[str, Any], image_seq_length: int) -> int:
    parts = [part for message in row["messages"] for part in message["content"]]
    characters = sum(len(part.get("text") or "") for part in parts)
    images = sum(part["type"] != "text" for part in parts)
    return int(characters / CHARACTERS_PER_TOKEN + images * image_seq_length)
