"""Make a row of each answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .media import FIELDS, kinds_of


def _first_turns(row: dict[str, Any], count: int) -> dict[str, Any]:
    messages = row["messages"][:count]
    shown = Counter(kinds_of(messages))
    media = {field: (row.get(field) or [])[: shown[kind]] for kind, field in FIELDS.items()}
    return {"id": row["id"], **media, "messages": messages}


def split_turns(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Make one row for each answer, with the turns before it, as an encoder-decoder needs.

    Images, videos and sounds stay with the turns that show them.
    """
    for row in rows:
        for end, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                yield _first_turns(row, end + 1)
