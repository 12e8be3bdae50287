"""Test the table of docs/vllm.md."""

from .table import table


def test_a_cell_that_was_not_run() -> None:
    rows = table(
        {"llava": {"images": ["equal", "equal"], "bfloat16": ["equal", "3"]}, "gemma3": {"embeddings": "refused"}}
    )
    assert rows.splitlines()[2:] == [
        "| `gemma3` | not run | refused | not run |",
        "| `llava` | equal | not run | none, 3 |",
    ]
