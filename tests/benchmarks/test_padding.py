"""Test the benchmark of padding at a tiny size."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import padding
from tests.vlm.tiny import build


def test_padding_of_the_mix() -> None:
    """Random batches have more padding than packed ones, and larger random batches have more. Packed rows with flash
    attention have none."""
    records = padding.measure_padding(2000)
    for record in records:
        assert record["random"] > record["packed"] >= 0
        assert (record["packed"] == 0) == (record["max_length"] is None)
    shares = {record["batch"]: record["random"] for record in records}
    assert shares[16] > shares[4]


def test_a_step_on_packed_rows_has_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "DIVISOR", 32)
    record: dict[str, Any] = padding.measure_step(2, 4, lambda name: build().bfloat16(), batches=5)
    tokens = record["tokens"]
    assert tokens["used"] <= tokens["packed"] < tokens["padded"]
    assert [len(values) for values in record["seconds"].values()] == [2, 2]
    page = padding.text(padding.measure_padding(500), record)
    assert f"| packed | {tokens['packed']:,} |" in page
