"""Write the table of docs/vllm.md from the results of the tests in this folder. `make vllm-table` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages import rewrite

from .conftest import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
BEGIN, END = "<!-- begin: written by python -m tests.engine.table -->", "<!-- end of the hosts -->"
HEADS = ("host", "images", "image embeddings", "first token that differs in bfloat16")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results in Markdown, with a row for each host."""
    lines = [f"| {' | '.join(HEADS)} |", f"|{' --- |' * len(HEADS)}"]
    for host, found in sorted(results.items()):
        cells = [same(found.get("images")), same(found.get("embeddings")), first(found.get("bfloat16"))]
        lines.append(f"| `{host}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def same(rows: list[str] | str | None) -> str:
    """Format the float32 results: either the test's own words, or the comparison of each image's tokens."""
    if rows is None or isinstance(rows, str):
        return rows or "not run"
    return "equal" if set(rows) == {"equal"} else f"token {', '.join(rows)} differs"


def first(rows: list[str] | None) -> str:
    """Format the bfloat16 results of each image."""
    return "not run" if rows is None else ", ".join("none" if row == "equal" else row for row in rows)


if __name__ == "__main__":
    rewrite(PAGE, BEGIN, END, table(json.loads(RESULTS.read_text(encoding="utf-8"))))
