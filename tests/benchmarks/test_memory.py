"""Test the committed comparison of predicted and measured memory: each case is within bounds, and the docs have its
table."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
RECORDS = json.loads((memory.RESULTS / "records.json").read_text(encoding="utf-8"))


def test_every_case_has_a_record() -> None:
    assert [record["case"] for record in RECORDS] == memory.CASES


@pytest.mark.parametrize(
    "record", RECORDS, ids=lambda record: " ".join(f"{key}={value}" for key, value in record["case"].items())
)
def test_every_case_is_within_its_bounds(record: dict[str, Any]) -> None:
    assert memory.is_near(record)


def test_table_in_the_docs_is_the_committed_one() -> None:
    table = (memory.RESULTS / "table.md").read_text(encoding="utf-8")
    assert table == memory.table(RECORDS)
    shown = PAGE.read_text(encoding="utf-8").split("<!-- table -->\n")[1].split("<!-- end of table -->")[0]
    assert shown == table
