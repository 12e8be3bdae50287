"""Rows with an image or another medium: an adapter without a text branch learns from no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .lengths import parts_of
from .mixture import selected


def rows_with_media(rows: Any) -> Any:
    """The rows that are not text alone, in their order; no image is opened.

    Args:
        rows: of `load_rows`, streamed or not.
    """
    if not isinstance(rows, Dataset):
        return rows.filter(_has_media)
    kept: list[np.ndarray] = []
    start = 0
    for batch in rows.select_columns(["messages"]).with_format("arrow").iter(batch_size=1000):
        parts, row_of_part = parts_of(batch)
        kept.append(start + np.unique(row_of_part[np.asarray(pc.not_equal(pc.struct_field(parts, "type"), "text"))]))
        start += len(batch)
    return selected(rows, pa.array(np.concatenate([*kept, np.empty(0, np.int64)]), type=pa.uint64()))


def _has_media(row: dict[str, Any]) -> bool:
    return any(part["type"] != "text" for message in row["messages"] for part in message["content"])
