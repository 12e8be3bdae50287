"""How long rows are, roughly, without a tokenizer and without opening a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

CHARACTERS_PER_TOKEN = 4  # of English; what matters is which row is longer than which


def row_lengths(rows: Any, image_seq_length: int) -> list[int]:
    """Tokens of each row, reckoned from its characters and its images.

    Args:
        rows: `datasets.Dataset` of `load_rows`; pictures that are in the table itself are not read.
        image_seq_length: tokens of an image.
    """
    lengths: list[int] = []
    for batch in rows.select_columns(["messages"]).with_format("arrow").iter(batch_size=1000):
        messages = batch["messages"].combine_chunks()
        contents = pc.struct_field(pc.list_flatten(messages), "content")
        parts = pc.list_flatten(contents)
        row_of_part = np.asarray(pc.list_parent_indices(messages))[np.asarray(pc.list_parent_indices(contents))]
        characters = np.asarray(pc.fill_null(pc.utf8_length(pc.struct_field(parts, "text")), 0))
        images = np.asarray(pc.equal(pc.struct_field(parts, "type"), "image")).astype(np.int64)
        tokens = characters / CHARACTERS_PER_TOKEN + images * image_seq_length
        lengths += np.bincount(row_of_part, weights=tokens, minlength=len(messages)).astype(int).tolist()
    return lengths
