"""Test that the doctor reports faulty rows by their ids, reports no sound row, and writes a copy without the
faults."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from peft_crome.cli import app
from peft_crome.data import ConversationCollator, load_rows, read_rows
from peft_crome.data.doctor import Patient, examine, write_fixed

runner = CliRunner()
QUESTION = {"from": "human", "value": "Hi"}
SHOWN = {"from": "human", "value": "<image>\nWhat?"}
ANSWER = {"from": "gpt", "value": "Hello"}

FAULTY: dict[str, tuple[str, dict[str, Any]]] = {
    "missing": ("missing", {"image": "none.png", "conversations": [SHOWN, ANSWER]}),
    "text.jpg": ("unreadable", {"image": "text.jpg", "conversations": [SHOWN, ANSWER]}),
    "outside": ("path", {"image": "../secret.png", "conversations": [SHOWN, ANSWER]}),
    "two places": ("placeholder", {"image": ["a.png"], "conversations": [SHOWN, ANSWER, SHOWN, ANSWER]}),
    "empty": ("empty", {"conversations": [QUESTION, {"from": "gpt", "value": ""}]}),
    "order": ("order", {"conversations": [QUESTION, QUESTION, ANSWER]}),
    "first": ("order", {"conversations": [ANSWER, QUESTION, {"from": "gpt", "value": "first"}], "model": "m"}),
    "last": ("order", {"conversations": [SHOWN, ANSWER, {"from": "human", "value": "bye"}], "image": "a.png"}),
    "again": ("duplicate", {"image": "a.png", "conversations": [SHOWN, ANSWER]}),
    "none": ("row", {"image": "a.png"}),
}
SOUND: dict[str, dict[str, Any]] = {
    "plain": {"image": "a.png", "conversations": [SHOWN, ANSWER]},
    "7": {"id": 7, "conversations": [QUESTION, ANSWER], "model": ""},
    "lamm": {"image": "sub/b.jpg", "conversations": [QUESTION, ANSWER]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "a.png")
    Image.new("RGB", (300, 20)).save(root / "sub" / "b.jpg")
    (root / "text.jpg").write_text("no image")
    rows = [{"id": name, **row} for name, row in SOUND.items()]
    rows += [{"id": name, **row} for name, (_, row) in FAULTY.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_each_faulty_row_is_found_and_no_other(path: Path) -> None:
    findings = examine(path, path.parent / "images")
    assert findings.rows == len(SOUND) + len(FAULTY)
    assert {patient.name: patient.faults[0].kind for patient in findings.patients} == {
        # "last" is the conversation of "plain" and "again" once what follows the answer is left out.
        name: kind for name, (kind, _) in FAULTY.items()
    }  # fmt: skip
    assert all(len(patient.faults) == 1 for patient in findings.patients if patient.name not in ("last", "again"))
    assert findings.histograms["longer side of images"] == {64: 3, 512: 1}
    assert findings.histograms["images in a row"][0] == 2


def test_command_names_rows_counts_and_fails(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    result = runner.invoke(app, ["doctor", str(path), "--images", str(tmp_path / "images")])
    assert result.exit_code == 1, result.output
    for name in FAULTY:
        assert f"row '{name}': " in result.stdout
    for name in SOUND:
        assert f"row '{name}'" not in result.stdout
    assert "13 rows, 2 of them text alone; 10 faulty." in result.stdout
    for words in ("a missing image", "roles out of order", "longer side of images, up to", "turns in a row"):
        assert words in result.stdout
    fixed = tmp_path / "fixed.json"
    result = runner.invoke(app, ["doctor", str(path), "--images", str(tmp_path / "images"), "--fix", str(fixed)])
    assert result.exit_code == 1
    assert path.read_bytes() == before
    rows = json.loads(fixed.read_text())
    assert [row["id"] for row in rows] == ["plain", 7, "lamm", "first"]
    assert rows[3]["model"] == "m"
    assert rows[3]["conversations"] == FAULTY["first"][1]["conversations"][1:]
    assert rows[:3] == json.loads(before)[:3], "sound rows are as they were"
    result = runner.invoke(app, ["doctor", str(fixed), "--images", str(tmp_path / "images")])
    assert result.exit_code == 0, result.output
    assert len(load_rows(fixed, tmp_path / "images")) == 4


@pytest.mark.parametrize("name", ["rows.json", "images/a.png"])
def test_nothing_is_overwritten(name: str, path: Path) -> None:
    target = path.parent / name
    before = target.read_bytes()
    result = runner.invoke(app, ["doctor", str(path), "--fix", str(target)])
    assert result.exit_code == 1
    assert "exists already, and no file is overwritten" in result.stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("target", "message"), [("no/such/a.json", "there is no folder"), ("a.txt", "only JSON and JSONL are written")]
)
def test_copy_that_cannot_be_is_refused_before_the_look(target: str, message: str, path: Path) -> None:
    result = runner.invoke(app, ["doctor", str(path), "--fix", str(path.parent / target)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "rows" not in result.stdout


def test_copy_keeps_what_utf8_cannot_hold(tmp_path: Path) -> None:
    """A fixed copy keeps a lone surrogate in a field that is not read."""
    row = {"conversations": [QUESTION, ANSWER], "note": "\ud800 é"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    write_fixed(tmp_path / "a.jsonl", tmp_path / "b.jsonl", examine(tmp_path / "a.jsonl"))
    assert json.loads((tmp_path / "b.jsonl").read_text()) == row


def test_copy_leaves_out_images_of_turns_that_it_leaves_out(tmp_path: Path) -> None:
    """A fixed copy drops the images of dropped turns, because LAMM's rule would put them before another question. The
    row's own images and those of turns are counted apart."""
    (tmp_path / "a.png").touch()
    own = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    user, answer = {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a", "from": None}
    rows = [
        {"id": "dict", "image": {"path": "a.png"}, "conversations": [QUESTION, ANSWER, SHOWN]},
        {"id": "text", "image": "a.png", "conversations": [QUESTION, ANSWER, SHOWN]},
        {"id": "list", "image": [{"path": "a.png"}], "conversations": [QUESTION, ANSWER, SHOWN]},
        {"id": "kept", "image": {"path": "a.png"}, "conversations": [SHOWN, ANSWER, QUESTION]},
        {"id": "own", "images": ["a.png"], "messages": [own, answer, user]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    findings = examine(tmp_path / "rows.json", open_images=False)
    findings.patients = [  # the first three are the same conversation once fixed
        Patient(one.number, one.name, tuple(fault for fault in one.faults if fault.kind != "duplicate"))
        for one in findings.patients
    ]
    assert write_fixed(tmp_path / "rows.json", tmp_path / "fixed.json", findings) == (5, 5)
    fixed = list(read_rows(tmp_path / "fixed.json"))
    assert [len(row["images"]) for row in fixed] == [0, 0, 0, 1, 1]
    assert [row["messages"] for row in fixed] == [row["messages"] for row in read_rows(tmp_path / "rows.json")]


SOUND_TURNS = json.dumps([QUESTION, ANSWER])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{{"conversations": {SOUND_TURNS}, "score": [NaN, {{"x": -Infinity}}, 0.5]}}'),
        ("b.json", f'[{{"conversations": {SOUND_TURNS}, "score": [1e400, {{"x": -1e400}}, 0.5]}}]'),
    ],
    ids=["a.jsonl", "b.json"],
)
def test_copy_writes_null_for_what_json_has_no_words_for(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    write_fixed(tmp_path / name, tmp_path / f"fixed-{name}.json", examine(tmp_path / name))
    findings = examine(tmp_path / f"fixed-{name}.json")
    assert (findings.rows, findings.patients) == (1, [])
    [row] = json.loads((tmp_path / f"fixed-{name}.json").read_text())
    assert row == {"conversations": [QUESTION, ANSWER], "score": [None, {"x": None}, 0.5]}


def test_copy_leaves_other_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [QUESTION, ANSWER]}]))
    (tmp_path / "b.json.tmp").write_text("mine")
    findings = examine(tmp_path / "a.json")
    with monkeypatch.context() as patched:
        patched.setattr("peft_crome.data.doctor.json.dumps", None)
        with pytest.raises(TypeError):
            write_fixed(tmp_path / "a.json", tmp_path / "b.json", findings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json.tmp"], "nothing half written"
    write_fixed(tmp_path / "a.json", tmp_path / "b.json", findings)
    assert (tmp_path / "b.json.tmp").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "b.json.tmp"]
    assert (tmp_path / "b.json").stat().st_mode == (tmp_path / "a.json").stat().st_mode, "others may read it"


def test_folder_is_told_to_be_none(tmp_path: Path) -> None:
    result = runner.invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert "is a folder; expected a file, JSON or parquet" in " ".join(result.stderr.split())
    assert "FILE.parquet" in result.stderr


def test_copy_by_line_and_of_messages(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"id": "x"},
        {"messages": [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n")
    findings = examine(path)
    assert [(patient.name, patient.faults[0].kind) for patient in findings.patients] == [
        ("x", "row"), ("2", "order"), ("3", "json"),
    ]  # fmt: skip
    assert write_fixed(path, tmp_path / "out.jsonl", findings) == (2, 1)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        rows[0], {"messages": rows[2]["messages"][1:]},
    ]  # fmt: skip


def test_only_the_file_is_looked_for_when_asked(path: Path) -> None:
    findings = examine(path, path.parent / "images", open_images=False)
    assert "unreadable" not in findings.by_kind()
    assert [name for name, _ in findings.by_kind()["missing"]] == ["missing"]


def test_rows_are_measured_in_tokens(path: Path, processor: Any) -> None:
    collator = ConversationCollator(processor, max_length=16)
    rows = [
        {"id": "short", "image": "a.png", "conversations": [
            {"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
        {"id": "cut", "image": "a.png", "conversations": [
            {"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2 w3 w4 w5 w6 w7"}]},
        {"id": "long", "image": "a.png", "conversations": [
            {"from": "human", "value": "w1 " * 30}, {"from": "gpt", "value": "w2"}]},
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    findings = examine(path, path.parent / "images", measure=collator.measure)
    assert {patient.name: patient.faults[0].kind for patient in findings.patients} == {
        "cut": "cut", "long": "long",
    }  # fmt: skip
    assert "9 of them image tokens" in findings.by_kind()["long"][0][1].message
    assert sum(findings.histograms["tokens in a row"].values()) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system", "x"]) | JSON,
        "value": st.sampled_from(["<image>", "hi", "", "<image> <image>"]) | JSON,
        "role": st.sampled_from(["user", "assistant"]) | JSON,
        "content": st.lists(
            st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": JSON})
        )
        | JSON,
    },
)
ROW = JSON | st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "image": st.sampled_from(["a.png", "../x", "/", "", ".", "a\0"]) | JSON,
        "images": JSON,
        "conversations": st.lists(TURN, max_size=4) | JSON,
        "messages": st.lists(TURN, max_size=4) | JSON,
        "prompt": JSON,
        "completion": JSON,
    },
)


@given(rows=st.lists(ROW, max_size=4))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_whatever_a_row_holds_it_is_read_or_named(rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    findings = examine(path, open_images=False)
    bad = {patient.number for patient in findings.patients if not all(fault.fixed for fault in patient.faults)}
    bad -= {p.number for p in findings.patients if {f.kind for f in p.faults} <= {"missing", "duplicate", "order"}
            and all(f.fixed for f in p.faults if f.kind == "order")}  # fmt: skip
    kept = list(read_rows(path, faulty="drop"))
    assert len(kept) == len(rows) - len(bad)
    for row in kept:
        shown = sum(part["type"] == "image" for message in row["messages"] for part in message["content"])
        assert shown == len(row["images"])
        assert row["messages"][-1]["role"] == "assistant"
        for image in row["images"]:
            assert Path(image).is_relative_to(tmp_path)
    (tmp_path / "fixed.json").unlink(missing_ok=True)
    write_fixed(path, tmp_path / "fixed.json", findings)
    assert not examine(tmp_path / "fixed.json", open_images=False).patients
