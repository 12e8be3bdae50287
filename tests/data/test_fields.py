"""Test the fields of a row. Each is read or refused by name, images as text are read, and no message repeats a large
value."""

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from peft_crome.cli import app
from peft_crome.data import ConversationCollator, RowError, load_rows, read_rows
from peft_crome.data.doctor import examine, write_fixed

SHOWN = [{"from": "human", "value": "<image>\nw1"}, {"from": "gpt", "value": "w2"}]
SAID = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
runner = CliRunner()


def png(color: Any = (200, 10, 20, 0), mode: str = "RGBA") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (40, 30), color).save(file, "PNG")
    return file.getvalue()


DATA = png()
BASE64 = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{BASE64}"


def write(tmp_path: Path, *rows: Any) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


@pytest.mark.parametrize(
    "row",
    [
        {"image": BASE64, "conversations": SHOWN},
        {"image": URI, "conversations": SAID},
        {"images": [URI], "conversations": SHOWN},
        {"image": {"bytes": BASE64, "path": "a.png"}, "conversations": SHOWN},
        {"image": {"url": URI}, "conversations": SHOWN},
        {"image": base64.encodebytes(DATA).decode(), "conversations": SHOWN},
        {"image": base64.urlsafe_b64encode(DATA).decode().rstrip("="), "conversations": SHOWN},
        {"image_base64": BASE64, "conversations": SHOWN},
        *(
            {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "w1"}]}, CHAT[1]]}
            for part in (
                {"type": "image", "image": URI},
                {"type": "image", "base64": BASE64},
                {"type": "image", "url": URI},
                {"type": "image_url", "image_url": {"url": URI}},
                {"type": "image_url", "image_url": URI},
            )
        ),
        {"conversations": [{"from": "human", "value": f"<img>{URI}</img>\nw1"}, SAID[1]]},
    ],
)
@pytest.mark.parametrize("read", [read_rows, load_rows], ids=["read", "loaded"])
def test_images_as_text_are_read(read: Any, row: dict[str, Any], processor: Any, tmp_path: Path) -> None:
    path = write(tmp_path, row)
    expected = processor(images=DATA, text="<image>", return_tensors="pt")["pixel_values"]
    [found] = read(path)
    assert found["images"][0]["bytes"] == DATA
    batch = ConversationCollator(processor)([found])
    assert torch.equal(batch["pixel_values"], expected)
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.split() == ["user:", *["<image>"] * 9, "w1", "assistant:", "w2"]
    assert not examine(path).patients


@pytest.mark.parametrize(
    "fields",
    [
        {"image_path": "a.png"},
        {"img": "a.png"},
        {"imgs": ["a.png"]},
        {"image_file": "a.png"},
        {"Image": "a.png"},
        {"photo": "a.png"},
        {"image": "a.png", "images": ["a.png"]},
        {"images": ["a.png"], "image_path": "/data/coco/a.png"},
        {"image": "a.png", "image_name": "a"},
        {"image": "file:///TMP/a.png"},
        {"image": "a.png", "image_url": "http://images.example/1234"},
        {"image": None, "images": [], "img_path": "a.png"},
        {"image": "a.png", "image_id": 7, "image_size": [40, 30]},
    ],
)
def test_images_of_other_fields_are_read(fields: dict[str, Any], tmp_path: Path) -> None:
    given = json.loads(json.dumps(fields).replace("/TMP", str(tmp_path)))
    [row] = read_rows(write(tmp_path, {**given, "conversations": SHOWN}))
    assert row["images"] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize("mark", ["<ImageHere>", "<start_of_image>", "<|image|>", "<image_placeholder>"])
def test_placeholders_of_other_models_where_there_are_as_many(mark: str, tmp_path: Path) -> None:
    said = [
        {"from": "human", "value": f"{mark}\n({mark})?"},
        SAID[1],
        {"from": "human", "value": f"{mark} w1"},
        SAID[1],
    ]
    plain = [{**turn, "value": turn["value"].replace(mark, "<image>")} for turn in said]
    images = ["a.png", "b.png", "c.png"]
    rows = [{"id": 1, "image": images, "conversations": turns} for turns in (said, plain)]
    first, second = read_rows(write(tmp_path, *rows))
    assert first == second


def test_images_that_parts_number(tmp_path: Path) -> None:
    """Parts that number their images, as in llava-instruct-mix-vsft, show the row's images in order."""
    text = {"type": "text", "text": "w1", "index": None}
    turns = [
        {"role": "user", "content": [{"type": "image", "index": 0, "text": None}, text]}, CHAT[1],
        {"role": "user", "content": [text, {"type": "image", "index": 1, "text": None}]}, CHAT[1],
    ]  # fmt: skip
    [row] = read_rows(write(tmp_path, {"images": ["a.png", "b.png"], "messages": turns}))
    assert row["images"] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_embedded_image_beside_its_path_is_one_image(tmp_path: Path) -> None:
    [row] = read_rows(write(tmp_path, {"image": URI, "image_path": "coco/a.png", "conversations": SHOWN}))
    assert row["images"] == [{"bytes": DATA, "path": None}]


def test_images_that_the_text_names(tmp_path: Path) -> None:
    """Images that the text names, in Qwen-VL's form, are read beside the row's own images."""
    said = "Picture 1: <img>a.png</img>\nPicture 2: <image>\nand <img> b.png </img>?"
    [row] = read_rows(write(tmp_path, {"image": "c.png", "conversations": [{"from": "user", "value": said}, SAID[1]]}))
    assert row["images"] == [str(tmp_path / name) for name in ("a.png", "c.png", "b.png")]
    texts = [part.get("text") for part in row["messages"][0]["content"]]
    assert texts == ["Picture 1: ", "", "\nPicture 2: ", "", "\nand ", "", "?"]


def test_images_that_the_text_numbers(tmp_path: Path) -> None:
    """Numbered placeholders are images, in MMMU's form and in Phi-3's. The numbers continue in later turns."""
    turns = [
        {"from": "human", "value": "<image 1> or <image 2>?"},
        SAID[1],
        {"from": "human", "value": "And <image 3>"},
        SAID[1],
    ]
    chat = [{"role": "user", "content": [{"type": "text", "text": "<|image_1|>\nw1"}]}, CHAT[1]]
    rows = [{"images": ["a.png", "b.png", "c.png"], "conversations": turns}, {"images": ["a.png"], "messages": chat}]
    first, second = read_rows(write(tmp_path, *rows))
    shown = [part["type"] for message in first["messages"] for part in message["content"]]
    assert shown == ["image", "text", "image", "text", "text", "text", "image", "text"]
    assert second["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "w1"}]


@pytest.mark.parametrize("mark", ["<Image>", "<IMAGE>", "<iMaGe>"])
def test_a_placeholder_in_any_case_is_an_image(mark: str, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": f"w1 {mark} w2"}]}, CHAT[1]]
    turns = [{"from": "human", "value": f"{mark}\nw1\n<image>"}, SAID[1], {"from": "human", "value": mark}, SAID[1]]
    rows = [{"image": "a.png", "messages": chat}, {"images": ["a.png", "b.png", "c.png"], "conversations": turns}]
    rows += [{**row, **json.loads(json.dumps(row).replace(mark, "<image>"))} for row in rows]
    first, second, *lower = read_rows(write(tmp_path, *rows))
    assert [row["messages"] for row in (first, second)] == [row["messages"] for row in lower]
    assert [part.get("text") for part in first["messages"][0]["content"]] == ["w1 ", "", " w2"]
    named = [{"conversations": [{"from": "human", "value": "<IMG>a.png</IMG>\nw1"}, SAID[1]]}]
    [row] = read_rows(write(tmp_path, *named))
    assert row["images"] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "human", "value": "<image> in <Image>"}, SAID[1]], "2 <image> and 1 images"),
        ([SHOWN[0], {"from": "gpt", "value": "<Image>"}], "an image stands in a turn from 'gpt'"),
        (
            [
                {"role": "user", "content": [{"type": "image", "image": URI}, {"type": "text", "text": "<Image>"}]},
                CHAT[1],
            ],
            "<Image> in a turn of the user is not read",
        ),
    ],
)
def test_a_placeholder_in_any_case_that_shows_no_image_is_refused(
    turns: list[Any], message: str, tmp_path: Path
) -> None:
    row = {"conversations": turns} | ({} if "role" in turns[0] else {"image": "a.png"})
    with pytest.raises(RowError, match=message):
        list(read_rows(write(tmp_path, row)))


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
def test_system_message_of_a_row(field: str, tmp_path: Path) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": " Be brief.\n"}]}
    turn = {"from": "system", "value": " Be brief.\n"}
    path = write(
        tmp_path,
        {field: " Be brief.\n", "conversations": SAID},
        {field: " Be brief.\n", "messages": CHAT},
        {field: " Be brief.\n", "conversations": [turn, *SAID]},
        {field: "", "conversations": SAID},
        {field: None, "conversations": SAID},
    )
    rows = list(read_rows(path))
    assert [row["messages"][0] for row in rows[:3]] == [system] * 3
    assert [len(row["messages"]) for row in rows] == [3, 3, 3, 2, 2]


FOREIGN = [
    {"conversations": [{"from": "human", "value": f"{mark}\nw1"}, SAID[1]]}
    for mark in (
        "<video>",
        "In <video>,",
        "<video>a.mp4</video>",
        "<video>\n<video>",
        "<audio>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|image_1|>",
        "<img>a.png",
        "See <IMG> b/c.JPG , and",
    )
] + [
    {"image": "a.png", "conversations": [{"from": "human", "value": f"w1 {mark}"}, SAID[1]]}
    for mark in (
        "<image 2>",
        "<image_1> <image_1>",
        "<image>, or <image_2>",
        "<img>",
        "<ImageHere><ImageHere>",
        "<start_of_image>, <start_of_image>",
    )
]
INDEXED = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "w1"}]
OF_TURNS: list[tuple[dict[str, Any], str]] = [
    ({"images": ["a.png"]}, r"a turn has \['images'\] of its own, which are not read"),
    ({"reasoning_content": "x"}, r"a turn has \['reasoning_content'\] of its own"),
    ({"value": "w9"}, "a turn has 'value' and 'content', which differ"),
    ({"weight": 0}, "a turn has 'weight': 0. All answers of a row are learned"),
    ({"content": [{"type": "text", "text": "w1", "image": "a.png"}]}, "is not a part of a turn"),
    ({"content": [{"type": "image", "image": "a.png", "text": "w1"}]}, "is not a part of a turn"),
]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "images": ["b.png"]}, r"'image' and 'images' hold different images. Take one of them out"),
        ({"image": "a.png", "images": ["a.png", "b.png"]}, "'image' and 'images' hold different images"),
        ({"image": "a.png", "img": "b.png"}, "'image' and 'img' hold different images"),
        ({"image": "a.png", "left_image": URI}, r"\['left_image'\] hold images, which are read from 'image'"),
        ({"screenshot": "a.png"}, r"\['screenshot'\] hold images"),
        ({"frames": ["1.jpg", "2.jpg"]}, r"\['frames'\] hold images"),
        ({"video": "a.mp4", "video_path": "b.mp4"}, r"'video' and 'video_path' hold different videos"),
        ({"audio": {"array": [0.0], "sampling_rate": 8000}}, "the sound .* is none; expected a path"),
        ({"tools": [{"name": "f"}]}, r"\['tools'\] cannot be read; write what the model is to read"),
        ({"system": {"text": "x"}}, r"the system message is \{'system': \{'text': 'x'\}\}; expected text"),
        ({"system": "a", "system_prompt": "b"}, r"\['system', 'system_prompt'\] are different system messages"),
        ({"system": "a", "conversations": [{"from": "system", "value": "b"}, *SAID]}, "is not that of its turns"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "w3"}]}, "'conversations' and 'messages' hold diff"),
        ({"image": "data:image/png;base64,!", "conversations": SHOWN}, "the base64 of the data URI is damaged"),
        ({"image": "A" * 5000, "conversations": SHOWN}, "is neither a path nor a file in base64"),
        *((row, "in a turn of the user is not read") for row in FOREIGN),
        *(
            ({"messages": [{**CHAT[0], **more}, CHAT[1]], "conversations": None}, message)
            for more, message in OF_TURNS
        ),
        (
            {
                "images": ["a.png", "b.png"],
                "messages": [{"role": "user", "content": INDEXED}, CHAT[1]],
                "conversations": None,
            },
            "an image has 'index': 1, and is number 0 of those that turns show",
        ),
        ({"image": "file:///etc/passwd.png", "conversations": SHOWN}, "leaves"),
        ({"conversations": [SAID[0], {"from": "gpt", "value": "<img>a.png</img>"}]}, "an image stands in a turn from"),
    ],
)
def test_what_is_not_read_is_refused_by_name(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"id": "r", "conversations": SAID, **row}
    with pytest.raises(RowError, match=r"row 'r': .*" + message):
        list(read_rows(write(tmp_path, row)))
    assert [patient.name for patient in examine(tmp_path / "rows.json", open_images=False).patients] == ["r"]


def test_words_that_are_no_placeholders_stay(tmp_path: Path) -> None:
    said = (
        "Why does <img> need no end, and what does <div> or <image 1> mean? a < b. What does the <video> tag, or "
        "`<audio>`, do in <video>\n  <source src='a.mp4'></video>? Is <Image> a component, and `<img>a.png` valid?"
    )
    answer = "Write <video controls>, <audio> and <|image_1|>."
    turns = [{"from": "human", "value": said}, {"from": "gpt", "value": answer, "weight": 1}]
    [row] = read_rows(write(tmp_path, {"conversations": turns}))
    assert [message["content"][0]["text"] for message in row["messages"]] == [said, answer]


def test_fields_that_are_not_read_are_counted_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turn = {**SHOWN[0], "timestamp": 3}
    rows = [
        {"id": 1, "image": "a.png", "conversations": SHOWN, "model": "m", "image_id": 4, "prompt": "x"},
        {"id": 2, "image": "a.png", "conversations": [turn, {**SHOWN[1], "value": "w3"}], "model": "m", "empty": ""},
    ]
    path = write(tmp_path, *rows)
    assert dict(examine(path).ignored) == {"model": 2, "image_id": 1, "prompt": 1, "conversations[].timestamp": 1}
    result = runner.invoke(app, ["doctor", str(path)])
    assert result.exit_code == 0, result.output
    counted = "model (2 rows), image_id (1 rows), prompt (1 rows), conversations[].timestamp (1 rows)"
    assert f"fields that are not read: {counted}" in result.stdout
    table = write(tmp_path, {"q": "w1", "a": "w2", "image": "a.png", "other": 1})
    assert dict(examine(table, columns={"question": "q", "answer": "a"}).ignored) == {"image": 1, "other": 1}


def test_copy_keeps_the_images_of_every_field(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(DATA)
    extra = {"from": "human", "value": "<image> and <img>a.png</img>"}
    rows = [
        {"id": 1, "image_path": ["a.png", "a.png"], "system": "w8", "conversations": [*SHOWN, extra]},
        {"id": 2, "img": URI, "conversations": [*SHOWN, {**extra, "value": "<img>a.png</img>"}]},
        {"id": 3, "image": "a.png", "conversations": [{"from": "human", "value": "<img>a.png</img>"}, SAID[1], extra]},
    ]
    path = write(tmp_path, *rows)
    findings = examine(path)
    assert write_fixed(path, tmp_path / "fixed.json", findings) == (3, 3)
    fixed = json.loads((tmp_path / "fixed.json").read_text())
    assert fixed[0] == {**rows[0], "image_path": ["a.png"], "conversations": SHOWN}
    assert fixed[1] == {**rows[1], "conversations": SHOWN}
    assert "image" not in fixed[2]
    assert list(read_rows(tmp_path / "fixed.json")) == list(read_rows(path))


LARGE = "iVBORw0KGgo" * 20_000


IMAGES_OF_ROWS = [
    LARGE, LARGE + ".png", "../" + LARGE, "http://x/" + LARGE, "data:image/png;base64," + LARGE, LARGE + "\0",
    [[LARGE]], {"x": LARGE},
]  # fmt: skip
TURNS_OF_ROWS: list[Any] = [
    [], LARGE, [{"from": "human", "value": [LARGE]}], [{"from": LARGE, "value": LARGE}],
    [{"from": "human", "value": [{"type": LARGE}]}], [{"from": "human", "value": LARGE + "\ud800"}],
    [{"from": "human", "value": f"<img>{LARGE}.png</img>"}, SAID[1]],
    [{"role": "user", "content": "w1", "weight": LARGE}],
]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        *({"image": image} for image in IMAGES_OF_ROWS),
        *({"id": LARGE, "conversations": turns} for turns in TURNS_OF_ROWS),
        {LARGE: 1, "conversations": None},
        {"system": [LARGE]},
        {"system": LARGE, "conversations": [{"from": "system", "value": "w1"}, *SAID]},
        {"image": "a.png", "images": [LARGE]},
        {"messages": [{"role": "user", "content": LARGE}]},
    ],
)
def test_no_message_repeats_a_large_value(
    row: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"conversations": SHOWN, **row}, {"conversations": SAID})
    result = runner.invoke(app, ["doctor", str(path)])
    assert result.exit_code == 1
    assert len(result.output) < 4000, result.output[:5000]
    with caplog.at_level(logging.WARNING):
        assert len(list(read_rows(path, faulty="drop"))) <= 2
    assert len(caplog.text) < 2500


@pytest.mark.parametrize(
    "columns",
    [{"question": "q", "answer": "a", "options": "q"}, {"question": "q", "answer": "none"}],
    ids=["options", "answer"],
)
def test_no_message_of_a_table_repeats_a_large_value(columns: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "w1", "a": LARGE, "o": [LARGE, "x"]})
    with pytest.raises(RowError) as error:
        list(read_rows(path, columns=columns))
    assert len(str(error.value)) < 1500


def test_missing_images_are_named_shortly(processor: Any, tmp_path: Path) -> None:
    path = write(tmp_path, {"id": LARGE, "image": "a" * 3000 + ".png", "conversations": SHOWN})
    [row] = read_rows(path)
    with pytest.raises(ValueError, match="cannot read the image") as error:
        ConversationCollator(processor)([row])
    assert len(str(error.value)) < 600
    with pytest.raises(RowError) as fault:
        ConversationCollator(processor, max_length=2).encode(row)
    assert len(str(fault.value)) < 600
