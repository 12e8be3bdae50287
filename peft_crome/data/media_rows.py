"""Select rows with media: an adapter without a text branch learns from no others."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .lengths import parts_of
from .mixture import selected


def rows_with_media(rows: Any, kinds: Set[str]) -> Any:
    """Select the rows that show a medium of one of the kinds, in their order. No file is opened.

    Args:
        rows: rows of `load_rows`, streamed or not.
        kinds: some of "image", "video" and "audio".
    """
    if not isinstance(rows, Dataset):
        return rows.filter(_shows, fn_kwargs={"kinds": kinds})
    wanted = pa.array(sorted(kinds))
    kept: list[np.ndarray] = []
    start = 0
    for batch in rows.select_columns(["messages"]).with_format("arrow").iter(batch_size=1000):
        parts, row_of_part = parts_of(batch)
        kept.append(start + np.unique(row_of_part[np.asarray(pc.is_in(pc.struct_field(parts, "type"), wanted))]))
        start += len(batch)
    return selected(rows, pa.array(np.concatenate([*kept, np.empty(0, np.int64)]), type=pa.uint64()))


def _shows(row: dict[str, Any], kinds: Set[str]) -> bool:
    return any(part["type"] in kinds for message in row["messages"] for part in message["content"])
