"""Test the references that rows have for an answer: several people's answers, and the options of a choice."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from peft_crome.data import RowError, load_rows, read_rows
from peft_crome.data.references import INSTRUCTION, as_choice, as_texts

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["red", "blue"], ["red", "blue"]),
        ([{"answer": "red", "answer_confidence": "yes", "answer_id": 1}, {"answer": "blue"}], ["red", "blue"]),
        ([1, 2.5], ["1", "2.5"]),
        ({"A": "a cell", "B": "a leaf"}, ["a cell", "a leaf"]),
        ("red", []),
        (None, []),
        ([True], []),
        ([{"text": "red"}], []),
        ({"text": ["red"], "answer_start": [3]}, []),
    ],
)
def test_lists_of_text(given: Any, expected: list[str]) -> None:
    assert as_texts(given) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (0, "A"),
        ("2", "C"),
        ("leaf", "B"),
        ("b", "B"),
        ("(C)", "C"),
        (3, None),
        ("D", None),
        (True, None),
        (None, None),
    ],
)
def test_right_option_by_number_text_or_letter(answer: Any, expected: str | None) -> None:
    assert as_choice(answer, ["cell", "leaf", "root"]) == expected


def test_rows_carry_them_and_training_does_not_keep_them(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "conversations": TURNS, "answers": [{"answer": "red"}] * 10, "choices": ["red", "blue"]},
        {"id": 2, "conversations": TURNS, "answers": "another meaning", "options": None},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    first, second = read_rows(tmp_path / "rows.json")
    assert (first["answers"], first["options"]) == (["red"] * 10, ["red", "blue"])
    columns = ["id", "images", "videos", "audio", "messages"]
    assert list(second) == columns
    assert load_rows(tmp_path / "rows.json").column_names == columns
    assert list(next(iter(load_rows(tmp_path / "rows.json", streaming=True)))) == columns


def test_vqa_and_choices_as_tables(tmp_path: Path) -> None:
    """Tables like VQAv2 and AI2D on the Hub are read. Saved folders stand in for them."""
    people = [{"answer": "red", "answer_id": n} for n in range(9)] + [{"answer": "pink", "answer_id": 9}]
    vqa = Dataset.from_list([{"question": "What color?", "answers": people, "question_id": 7}])
    vqa.save_to_disk(tmp_path / "vqa")
    columns = {"question": "question", "answer": "answers", "id": "question_id"}
    (row,) = read_rows(tmp_path / "vqa", columns=columns)
    assert (row["id"], row["answers"]) == ("7", ["red"] * 9 + ["pink"])
    assert row["messages"][1]["content"] == [{"type": "text", "text": "red"}]
    assert load_rows(tmp_path / "vqa", columns=columns)[0]["messages"][1]["content"][0]["text"] == "red"

    choices = Dataset.from_list([{"question": "Which?", "options": ["cell", "leaf"], "answer": "1"}] * 2)
    choices.save_to_disk(tmp_path / "ai2d")
    columns = {"question": "question", "answer": "answer", "options": "options"}
    row, _ = read_rows(tmp_path / "ai2d", columns=columns)
    assert row["options"] == ["cell", "leaf"]
    assert row["messages"][0]["content"][0]["text"] == f"Which?\nA. cell\nB. leaf\n{INSTRUCTION}"
    assert row["messages"][1]["content"][0]["text"] == "B"


def test_names_of_classes_are_read(tmp_path: Path) -> None:
    features = Features({"q": Value("string"), "label": ClassLabel(names=["cat", "dog"]), "x": List(Value("int64"))})
    Dataset.from_dict({"q": ["a", "b"], "label": [1, None], "x": [[1], [2]]}, features).save_to_disk(tmp_path / "set")
    columns = {"question": "q", "answer": "label"}
    rows = list(read_rows(tmp_path / "set", columns=columns, faulty="drop"))
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["dog"]


@pytest.mark.parametrize("answer", [3, "30", "option 29"])
def test_more_options_than_letters_name_their_number(answer: Any, tmp_path: Path) -> None:
    options = [f"option {number}" for number in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps([{"q": "Which?", "o": options, "a": answer, "n": "x"}]))
    columns = {"question": "q", "answer": "a", "options": "o", "id": "n"}
    with pytest.raises(RowError, match="30 options, and letters for 26") as error:
        list(read_rows(tmp_path / "rows.json", columns=columns))
    assert [fault.kind for fault in error.value.faults] == ["answer"]
    assert (as_choice("option 25", options), as_choice("option 26", options)) == ("Z", None)


def test_answer_that_is_no_option_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"q": "Which?", "o": ["cell", "leaf"], "a": 4, "n": "x"}]))
    columns = {"question": "q", "answer": "a", "options": "o", "id": "n"}
    with pytest.raises(ValueError, match=r"row '?0'?.*the answer 4 is none of the options \['cell', 'leaf'\]"):
        list(read_rows(tmp_path / "rows.json", columns=columns))
