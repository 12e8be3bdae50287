"""Test the formats of rows: which are read, and the errors for rows that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from peft_crome.data import RowError, load_rows, read_rows

TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
QUESTION = {"from": "human", "value": "Hi"}
ANSWER = {"from": "gpt", "value": "Hello"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_as_published(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [  # LCS-558K: the image comes last
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"}, ANSWER]},
        {"id": "a/1", "image": "one.png", "conversations": TURNS, "model": ""},
        {"id": 7, "model": "", "conversations": [QUESTION, ANSWER]},  # of the 665K mix: text alone
        {"id": 8, "image": ["one.png", "two/b.png"],
         "conversations": [{"from": "human", "value": "<image> or <image>?"}, ANSWER]},
        {"id": 9, "image": "one.png", "task_type": "conversation", "src_dataset": "coco",  # LAMM: nowhere
         "conversations": [{"from": "human", "value": "LAMM"}, ANSWER]},
        {"image": "", "conversations": [{"from": "system", "value": "Be brief."}, QUESTION, ANSWER]},
        {"id": None, "images": ["one.png"], "conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
    ]  # fmt: skip
    read = list(read_rows(write(tmp_path / f"rows{suffix}", rows), tmp_path / "images"))
    assert [row["id"] for row in read] == ["004539375", "a/1", "7", "8", "9", "5", "6"]
    assert read[0]["messages"][0]["content"] == [text("Render a clear and concise summary of the photo."), IMAGE]
    assert read[1]["messages"] == [
        {"role": "user", "content": [IMAGE, text("What is this?")]},
        {"role": "assistant", "content": [text("A cat.")]},
    ]
    assert read[1]["images"] == [str(tmp_path / "images" / "one.png")]
    assert read[2]["images"] == []
    assert [part["type"] for part in read[3]["messages"][0]["content"]] == ["image", "text", "image", "text"]
    assert read[4]["messages"][0]["content"] == [IMAGE, text("LAMM")]
    assert [message["role"] for message in read[5]["messages"]] == ["system", "user", "assistant"]
    assert read[6]["messages"][0]["content"] == [IMAGE, text("Hi")]


ASKED = {"role": "user", "content": [IMAGE, text("What?")]}
RED = {"role": "assistant", "content": "red"}
RED_IN_PARTS = {"role": "assistant", "content": [text("red")]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, RED], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "What?"}, RED], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text("What?")]}, RED]},
        {"prompt": [ASKED], "completion": [RED_IN_PARTS], "images": ["a.png"]},
    ],
    ids=["shown in parts", "shown nowhere", "named in parts", "prompt and completion"],
)
def test_messages_as_trl_and_chat_templates_have_them(row: dict[str, Any], tmp_path: Path) -> None:
    [found] = read_rows(write(tmp_path / "rows.json", [row]))
    assert found["images"] == [str(tmp_path / "a.png")]
    assert found["messages"] == [ASKED, RED_IN_PARTS]


OWN = {"role": "user", "content": [{"type": "image", "image": "own.png"}, text("What?")]}
BARE = {"role": "user", "content": [IMAGE, text("And this <image>?")]}


def test_images_of_turns_and_of_the_row_stand_where_they_are_shown(tmp_path: Path) -> None:
    rows = [
        {"messages": [OWN, RED, BARE, RED], "images": ["0.png", "1.png"]},
        {"messages": [BARE, RED, OWN, RED], "images": ["0.png", "1.png"]},
    ]
    orders = [["own.png", "0.png", "1.png"], ["0.png", "1.png", "own.png"]]
    read = list(read_rows(write(tmp_path / "rows.json", rows)))
    assert [row["images"] for row in read] == [[str(tmp_path / name) for name in names] for names in orders]


@pytest.mark.parametrize("images", [[], ["0.png"], ["0.png", "1.png", "2.png"]], ids=["none", "one", "three"])
def test_images_of_turns_and_of_the_row_are_counted_together(images: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [{"messages": [OWN, RED, BARE, RED], "images": images}])
    with pytest.raises(RowError, match=rf"3 <image> and {len(images) + 1} images"):
        list(read_rows(path))


@pytest.mark.parametrize("nothing", [None, "", []])
def test_nothing_under_image_leaves_images(nothing: Any, tmp_path: Path) -> None:
    question = {"from": "human", "value": "LAMM"}
    rows = [{"image": nothing, "images": ["a.png"], "conversations": [question, ANSWER]},
            {"image": "a.png", "images": nothing, "conversations": [question, ANSWER]},
            {"image": nothing, "images": nothing, "conversations": [question, ANSWER]}]  # fmt: skip
    read = list(read_rows(write(tmp_path / "rows.json", rows)))
    assert [row["images"] for row in read] == [[str(tmp_path / "a.png")]] * 2 + [[]]


def test_nulls_of_a_table_that_holds_two_forms(tmp_path: Path) -> None:
    turns = [
        {"from": None, "value": None, "role": "user", "content": "q"},
        {"from": "gpt", "value": "a", "role": None, "content": None},
    ]
    row = {"conversations": None, "messages": turns, "options": None, "choices": ["a", "b"]}
    [read] = read_rows(write(tmp_path / "rows.json", [row]))
    assert [(message["role"], message["content"]) for message in read["messages"]] == [
        ("user", [text("q")]), ("assistant", [text("a")]),
    ]  # fmt: skip
    assert read["options"] == ["a", "b"]
    parts = [{"type": "image", "text": None, "image": ""}, {"type": "text", "text": "q", "image": None}]
    row = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}],
        "images": ["a.png"],
    }
    [read] = read_rows(write(tmp_path / "rows.json", [row]))
    assert read["images"] == [str(tmp_path / "a.png")]
    assert read["messages"][0]["content"] == [IMAGE, text("q")]


def test_images_as_plain_bytes(tmp_path: Path) -> None:
    table = {"q": ["What?"] * 2, "a": ["red"] * 2, "image": [b"png", b"jpg"], "two": [[b"a", b"b"]] * 2}
    pa.parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    columns = {"question": "q", "answer": "a", "image": "image"}
    read = list(read_rows(tmp_path / "rows.parquet", columns=columns))
    assert [row["images"] for row in read] == [[{"bytes": data, "path": None}] for data in (b"png", b"jpg")]
    [row, _] = read_rows(tmp_path / "rows.parquet", columns={**columns, "image": "two"})
    assert row["images"] == [{"bytes": data, "path": None} for data in (b"a", b"b")]
    assert load_rows(tmp_path / "rows.parquet", columns=columns)[1]["images"] == read[1]["images"]


def test_tables_with_named_columns(tmp_path: Path) -> None:
    table = {
        "q": ["What?", "How many?"],
        "people": [["red", "blue", "red"], ["2", "3", "3"]],
        "image": [{"bytes": b"png", "path": None}, {"bytes": b"jpg", "path": "x.jpg"}],
    }
    pa.parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    columns = {"question": "q", "answer": "people", "image": "image"}
    read = list(read_rows(tmp_path / "rows.parquet", columns=columns))
    assert [row["messages"][1]["content"][0]["text"] for row in read] == ["red", "3"]
    assert read[0]["messages"][0]["content"] == [IMAGE, text("What?")]
    assert read[1]["images"] == [{"bytes": b"jpg", "path": "x.jpg"}]
    rows = [{"image": "a.png", "label": 3}]
    settings: dict[str, Any] = {"columns": {"answer": "label", "image": "image"}, "prompt": "Which digit?"}
    [row] = read_rows(write(tmp_path / "captions.json", rows), **settings)
    assert [message["content"][-1]["text"] for message in row["messages"]] == ["Which digit?", "3"]
    with pytest.raises(ValueError, match=r"no column \['text'\]; the columns are \['image', 'label'\]"):
        list(read_rows(tmp_path / "captions.json", columns={"answer": "text"}, prompt="Which digit?"))
    with pytest.raises(ValueError, match=r"expected the names of `answer` and `question`"):
        list(read_rows(tmp_path / "captions.json", columns={"answer": "label"}))
    with pytest.raises(ValueError, match="needs columns"):
        list(read_rows(tmp_path / "captions.json", prompt="What?"))


def test_what_stands_outside_question_and_answer_is_left_out(tmp_path: Path) -> None:
    """An answer before the first question is left out, as in LLaVA's own code. A turn after the last answer is left
    out too, because nothing is learned from it."""
    rows = [
        {"conversations": [ANSWER, QUESTION, ANSWER]},
        {"conversations": [*TURNS, {"from": "human", "value": "<image> And this?"}], "image": ["a.png", "b.png"]},
    ]
    first, second = read_rows(write(tmp_path / "rows.json", rows))
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant"]
    assert second["images"] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ("text", "row", "row '0': str instead of an object"),
        ({"id": 3}, "row", r"row '3': no conversation in the fields \['id'\].* --column question=NAME"),
        ({"id": 3, "conversations": []}, "row", r"row '3': 'conversations' is \[\]"),
        ({"id": 3, "conversations": TURNS, "video": 5}, "path", "row '3': the video '5' is none; expected a path"),
        ({"id": 3, "conversations": [{"from": "robot", "value": "x"}]}, "turn", "row '3': .*robot.* is not a turn"),
        ({"id": 3, "conversations": [{"from": ["gpt"], "value": "x"}]}, "turn", "row '3': .* is not a turn; expected"),
        ({"id": 3, "conversations": [QUESTION, {"from": "gpt", "value": 5}]}, "turn", "row '3': .* is not a turn"),
        ({"id": 3, "messages": [{"role": "user", "content": [{"type": "file"}]}]}, "turn", "is not a part of a turn"),
        ({"id": 3, "conversations": TURNS[:1], "image": "a.png"}, "answer", "row '3': no turn is from 'gpt'"),
        ({"id": 3, "conversations": [ANSWER]}, "answer", "row '3': the only answer has no question before it"),
        ({"id": 3, "conversations": TURNS}, "placeholder", "row '3': 1 <image> and 0 images. Write one <image> per"),
        ({"id": 3, "conversations": TURNS, "image": ["a", "b"]}, "placeholder", "row '3': 1 <image> and 2 images"),
        (
            {"id": 3, "conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}], "image": "a"},
            "placeholder",
            "row '3': an image stands in a turn from 'gpt'. Only the user's turns",
        ),
        ({"id": 3, "conversations": TURNS, "images": [None]}, "path", "row '3': the image 'None' is none"),
        ({"id": 3, "conversations": TURNS, "image": 5}, "path", "row '3': the image '5' is none; expected a path"),
        ({"id": 3, "conversations": TURNS, "image": "../a.png"}, "path", r"row '3': the image path '../a.png' leaves"),
        (
            {"id": 3, "conversations": TURNS, "image": "b/../../a"},
            "path",
            "row '3': the image path 'b/../../a' leaves",
        ),
        ({"id": 3, "conversations": TURNS, "image": "/etc/passwd"}, "path", "the image path '/etc/passwd' leaves"),
        ({"id": 3, "conversations": TURNS, "image": "http://x/a.png"}, "path", "is an address. Download it"),
        ({"id": 3, "conversations": TURNS, "image": "a\0.png"}, "path", "holds a zero byte"),
        ({"id": 3, "conversations": TURNS, "image": "a\ud800.png"}, "path", "or half a character"),
        ({"id": "\ud800", "conversations": [QUESTION, {"from": "gpt", "value": "\ud800"}]}, "turn", "lone surrogate"),
        ({"id": 3, "conversations": [QUESTION, {"from": "gpt", "value": " "}]}, "empty", "from 'assistant' is empty"),
        ({"id": 3, "conversations": [QUESTION, QUESTION, ANSWER]}, "order", "roles out of order: user, user, assist"),
    ],
)
def test_faulty_row_is_named(row: Any, kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("rows.jsonl" if isinstance(row, dict) else "rows.json")  # a line of JSONL is an object
    with pytest.raises(RowError, match=message) as error:
        list(read_rows(write(path, [row])))
    assert kind in [fault.kind for fault in error.value.faults]
    sound = {"id": 4, "conversations": [QUESTION, ANSWER]}
    kept = read_rows(write(path, [row, sound]), faulty="drop")
    assert [one["id"] for one in kept] == ["4"]


def test_dropped_rows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": "bad"}, {"conversations": [QUESTION, ANSWER]}, {"id": "worse"}]
    list(read_rows(write(tmp_path / "rows.json", rows), faulty="drop"))
    assert "2 faulty rows were left out. The first: " in caplog.text
    assert "row 'bad'" in caplog.text


def test_a_folder_per_beginning(tmp_path: Path) -> None:
    rows = [{"id": name, "image": name, "conversations": TURNS} for name in ("coco/train/1.jpg", "gqa/2.jpg", "3.jpg")]
    path = write(tmp_path / "rows.json", rows)
    folders = {"coco": "/data/coco2017", "": str(tmp_path)}
    found = [row["images"][0] for row in read_rows(path, folders)]
    assert found == ["/data/coco2017/train/1.jpg", str(tmp_path / "gqa" / "2.jpg"), str(tmp_path / "3.jpg")]
    with pytest.raises(ValueError, match=r"'gqa/2.jpg' begins with none of 'coco'. Name a folder for it in `images`"):
        list(read_rows(path, {"coco": "/data"}))
    rows[0]["image"] = "coco/../../secret.jpg"
    with pytest.raises(ValueError, match="leaves /data/coco2017"):
        list(read_rows(write(path, rows), folders))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a JSON list, JSONL or parquet"):
        list(read_rows(tmp_path / "missing.json"))
    sound = json.dumps({"conversations": [QUESTION, ANSWER]})
    (tmp_path / "cut.json").write_text(f'[{sound}, {{"id": 1')
    rows = read_rows(tmp_path / "cut.json")
    assert next(rows)["id"] == "0"
    with pytest.raises(
        ValueError, match=r"cut.json, row '1': the file is not JSON after row 1 .* nothing that follows"
    ):
        next(rows)
    (tmp_path / "cut.jsonl").write_text(f'{{"id": 1, "conversations": []\n\n{sound}\n')
    with pytest.raises(ValueError, match=r"cut\.jsonl, row '0': line 1 is not JSON"):
        list(read_rows(tmp_path / "cut.jsonl"))
    assert len(list(read_rows(tmp_path / "cut.jsonl", faulty="drop"))) == 1
    (tmp_path / "object.json").write_text('{\n"rows": []\n}')
    with pytest.raises(ValueError, match="holds one object; expected a list of rows"):
        list(read_rows(tmp_path / "object.json"))
    (tmp_path / "table.csv").write_text("image,answer\na.png,a cat\n")
    for read in (load_rows, lambda path: list(read_rows(path))):
        with pytest.raises(ValueError, match=r"table.csv is CSV; .*pandas.read_csv\('.*table.csv'\).to_json\("):
            read(tmp_path / "table.csv")
    (tmp_path / "image.json").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"image.json begins with .*; expected a JSON list"):
        list(read_rows(tmp_path / "image.json"))
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"row '0': line 1 is not JSON .*utf-8"):
        list(read_rows(tmp_path / "latin.jsonl"))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[" + sound.encode() + b"]")
    assert len(list(read_rows(tmp_path / "bom.json"))) == 1
