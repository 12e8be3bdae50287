"""The table of docs/vllm.md: what `make test-vllm` found.

python -m tests.engine.table            # write it
python -m tests.engine.table --check    # fail where it is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.pages import rewrite

from .conftest import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
BEGIN, END = "<!-- begin: written by python -m tests.engine.table -->", "<!-- end of the hosts -->"
HEADS = ("host", "images", "image embeddings", "first token that differs in bfloat16")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each host."""
    lines = [f"| {' | '.join(HEADS)} |", f"|{' --- |' * len(HEADS)}"]
    for host, found in sorted(results.items()):
        embeddings = tokens(found["embeddings"]) if "embeddings" in found else "not run"
        cells = [tokens(found.get("images")), embeddings, first(found.get("bfloat16"))]
        lines.append(f"| `{host}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tokens(rows: list[str] | str | None) -> str:
    """What float32 gave."""
    if isinstance(rows, str):
        return rows
    if rows is None:
        return "refused"
    return "equal" if set(rows) == {"equal"} else f"token {', '.join(rows)} differs"


def first(rows: list[str] | None) -> str:
    """What bfloat16 gave, for each image."""
    return ", ".join("none" if row == "equal" else row for row in rows or ["not run"])


def main() -> None:
    """Write the table, or compare it."""
    check = "--check" in sys.argv
    if rewrite(PAGE, BEGIN, END, table(json.loads(RESULTS.read_text(encoding="utf-8"))), check) and check:
        sys.exit(f"{PAGE.name} is out of date. Write: python -m tests.engine.table")


if __name__ == "__main__":
    main()
