"""Test rows for TRL's trainers: prompts, answers to compare with, preferences, and images that are opened late."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Image, IterableDataset, List
from PIL import Image as Pillow

from peft_crome.data import RowError, load_rows, open_image, read_rows, split_turns, to_trl
from peft_crome.data.doctor import examine, write_fixed

Q, A = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}
MORE, LAST = {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"}
SYSTEM = {"from": "system", "value": "Be brief."}


def said(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the roles of turns and their texts, with the type of each part that is not text."""
    return [
        (message["role"], [part["text"] if part["type"] == "text" else part["type"] for part in message["content"]])
        for message in messages
    ]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    Pillow.new("RGB", (6, 4), "red").save(folder / "a.png")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.mark.parametrize(
    "read", [read_rows, load_rows, partial(load_rows, streaming=True)], ids=["read", "loaded", "streamed"]
)
def test_last_answer_is_the_completion_of_all_that_was_said_before(read: Any, tmp_path: Path) -> None:
    shown = {"id": "s", "image": "a.png", "conversations": [SYSTEM, Q, A, MORE, LAST]}
    spoken = {"id": "t", "conversations": [MORE, LAST]}
    given = read(write(tmp_path, shown, spoken))
    table = to_trl(given)
    assert isinstance(table, type(given) if isinstance(given, IterableDataset) else Dataset)
    assert table.features["images"] == List(Image(mode="RGB"))
    first, second = table
    assert (first["id"], said(first["completion"])) == ("s", [("assistant", ["Yes"])])
    assert said(first["prompt"]) == [
        ("system", ["Be brief."]),
        ("user", ["image", "What?"]),
        ("assistant", ["red"]),
        ("user", ["Sure?"]),
    ]
    assert [image.size for image in first["images"]] == [(6, 4)]
    assert (said(second["prompt"]), second["images"]) == ([("user", ["Sure?"])], [])
    assert [row["answers"] for row in table] == [["Yes"], ["Yes"]]


def test_each_answer_may_have_a_row(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "a.png", "conversations": [Q, A, MORE, LAST]})
    assert [row["answers"] for row in to_trl(split_turns(read_rows(path)))] == [["red"], ["Yes"]]


def test_answers_of_several_people_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path, {"conversations": [MORE, LAST], "answers": ["Yes", "Yes", "No"]})
    assert to_trl(read_rows(path))[0]["answers"] == ["Yes", "Yes", "No"]


def test_rows_are_on_disk_and_images_are_opened_when_their_row_is(tmp_path: Path) -> None:
    table = to_trl(read_rows(write(tmp_path, {"image": "a.png", "conversations": [Q, A]})))
    assert table.cache_files
    (tmp_path / "a.png").unlink()
    assert table["answers"][0] == ["red"]
    with pytest.raises(FileNotFoundError):
        table[0]


def test_images_are_those_that_the_collator_opens(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "a.png", "conversations": [Q, A]})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Pillow.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    [image] = to_trl(read_rows(path))[0]["images"]
    expected = open_image(str(tmp_path / "a.png"), "a host's", processor=object())
    assert (image.mode, image.size) == ("RGB", (4, 6))
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    [held] = to_trl(
        [{**next(read_rows(path)), "images": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]}]
    )
    assert np.array_equal(np.asarray(held["images"][0]), np.asarray(image))


ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
PREFERENCES: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": [ASKED], "chosen": [{"role": "assistant", "content": "red"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]},
    "LLaMA-Factory": {"conversations": [Q], "chosen": A, "rejected": {"from": "gpt", "value": "blue"}},
    "a rejected answer": {"conversations": [Q, A], "rejected": "blue"},
    "whole conversations": {"messages": [ASKED, {"role": "assistant", "content": "red"}], "chosen": [Q, A],
                            "rejected": [Q, {"from": "gpt", "value": "blue"}]},
    "table": {"question": "What?", "chosen": "red", "rejected": "blue"},
}  # fmt: skip


@pytest.mark.parametrize("form", PREFERENCES)
def test_preferences_as_they_are_published(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "a.png", **PREFERENCES[form]})
    columns = {"question": "question", "answer": "chosen", "rejected": "rejected", "image": "image"}
    [row] = read_rows(path, columns=columns if form == "table" else None)
    assert row["rejected"] == "blue"
    [row] = to_trl([row])
    assert said(row["prompt"]) == [("user", ["image", "What?"])]
    assert (said(row["chosen"]), said(row["rejected"])) == ([("assistant", ["red"])], [("assistant", ["blue"])])
    assert "completion" not in row  # DPOTrainer takes no row with both
    rows = list(read_rows(path, columns=columns if form == "table" else None))
    [row] = to_trl(Dataset.from_list(rows))  # a table of one's own
    assert said(row["rejected"]) == [("assistant", ["blue"])]


@pytest.mark.parametrize("rejected", [None, "", 3, ["blue"], [Q], {"from": "gpt"}])
def test_other_fields_of_that_name_are_not_read(rejected: Any, tmp_path: Path) -> None:
    [row] = read_rows(write(tmp_path, {"image": "a.png", "conversations": [Q, A], "rejected": rejected}))
    assert "rejected" not in row


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There are no rows"):
        to_trl(iter([]))
    plain, preference = {"id": "p", "conversations": [MORE, LAST]}, {"conversations": [MORE, LAST], "rejected": "No"}
    with pytest.raises(ValueError, match="Row 'p' has no rejected answer, unlike the first row"):
        to_trl(read_rows(write(tmp_path, preference, plain)))
    with pytest.raises(ValueError, match="has a rejected answer, unlike"):
        to_trl(read_rows(write(tmp_path, plain, preference)))
    with pytest.raises(RowError, match="nothing to learn"):
        to_trl(read_rows(write(tmp_path, plain, {"conversations": [MORE]})))


def test_a_faulty_row_whose_answer_is_chosen_is_left_out_of_a_fixed_copy(tmp_path: Path) -> None:
    sound = {"conversations": [MORE], "chosen": LAST, "rejected": A}
    path = write(tmp_path, sound, {"conversations": [A, MORE], "chosen": LAST, "rejected": A})
    assert write_fixed(path, tmp_path / "fixed.json", examine(path)) == (1, 0)
    assert json.loads((tmp_path / "fixed.json").read_text()) == [sound]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_rows_with_a_video_or_a_sound_are_refused(kind: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": f"<{kind}>\nWhat?"}, A]
    path = write(tmp_path, {"id": "moving", kind: "a.mp4", "conversations": turns})
    with pytest.raises(ValueError, match="Row 'moving' has a video or a sound, and TRL's trainers take images alone"):
        to_trl(read_rows(path))


def test_a_preference_in_texts_is_about_the_last_question(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}, {"from": "human", "value": "3+3?"}]
    [row] = to_trl(read_rows(write(tmp_path, {"id": "s", "conversations": turns, "chosen": "6", "rejected": "7"})))
    assert said(row["prompt"])[-1] == ("user", ["3+3?"])
    assert (said(row["chosen"]), said(row["rejected"])) == ([("assistant", ["6"])], [("assistant", ["7"])])
    path = write(tmp_path, {"id": "s", "conversations": turns, "rejected": "7"})
    with pytest.raises(RowError, match="'rejected' answers the last turn, which has no 'chosen' answer"):
        list(read_rows(path))
