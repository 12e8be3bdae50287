"""The LLaVA format: what is read, and what is said of rows that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from peft_crome.data import read_llava

TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_become_messages(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"id": "a/1", "image": "one.png", "conversations": TURNS, "model": ""},
        {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": 8, "image": ["one.png", "two/b.png"],
         "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "one"}]},
        {"id": 9, "image": "one.png",
         "conversations": [{"from": "human", "value": "LAMM"}, {"from": "gpt", "value": "y"}]},
    ]  # fmt: skip
    read = list(read_llava(write(tmp_path / f"rows{suffix}", rows), tmp_path / "images"))
    assert [row["id"] for row in read] == ["a/1", "7", "8", "9"]
    image, question = {"type": "image"}, {"type": "text", "text": "What is this?"}
    assert read[0]["messages"] == [
        {"role": "user", "content": [image, question]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    assert read[0]["images"] == [str(tmp_path / "images" / "one.png")]
    assert read[1]["images"] == []
    assert [part["type"] for part in read[2]["messages"][0]["content"]] == ["image", "text", "image", "text"]
    assert read[3]["messages"][0]["content"] == [image, {"type": "text", "text": "LAMM"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "row 0: str instead of an object"),
        ({"id": 3}, r"row 3: 'conversations' is None; expected \[\{'from'"),
        ({"id": 3, "conversations": []}, "row 3: 'conversations' is"),
        ({"id": 3, "conversations": [{"from": "robot", "value": "x"}]}, "row 3: the turn .*robot.* is none; expected"),
        ({"id": 3, "conversations": [{"from": "gpt", "value": 5}]}, "row 3: the turn"),
        ({"id": 3, "conversations": TURNS[:1], "image": "a.png"}, "row 3: no turn is from 'gpt'"),
        ({"id": 3, "conversations": TURNS}, "row 3: 1 <image> and 0 images. Write one <image> per image"),
        ({"id": 3, "conversations": TURNS, "image": ["a", "b"]}, "row 3: 1 <image> and 2 images"),
        (
            {"id": 3, "conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}], "image": "a"},
            "row 3: <image> stands in a turn from 'assistant'. Only 'human' turns show images",
        ),
        ({"id": 3, "conversations": TURNS, "image": 5}, "row 3: 'image' is 5; expected a path"),
        ({"id": 3, "conversations": TURNS, "image": "../a.png"}, r"row 3: the image path '../a.png' leaves"),
        ({"id": 3, "conversations": TURNS, "image": "/etc/passwd"}, "row 3: the image path '/etc/passwd' leaves"),
    ],
)
def test_faulty_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_llava(write(tmp_path / "rows.json", [row])))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a JSON list or JSONL"):
        list(read_llava(tmp_path / "missing.json"))
    (tmp_path / "cut.json").write_text('[{"id": 1')
    with pytest.raises(ValueError, match=r"cut.json is not JSON .* needs the ending .jsonl"):
        list(read_llava(tmp_path / "cut.json"))
    (tmp_path / "cut.jsonl").write_text('{"id": 1, "conversations": []\n')
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 1: not JSON"):
        list(read_llava(tmp_path / "cut.jsonl"))
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a dict; expected a list of rows"):
        list(read_llava(tmp_path / "object.json"))
