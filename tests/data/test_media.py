"""Test videos and sounds of rows: how they are named, placed and kept, and the errors for unreadable files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Audio, Dataset, Video
from PIL import Image
from typer.testing import CliRunner

from peft_crome.cli import app
from peft_crome.data import ConversationCollator, RowError, check_files, load_rows, read_rows, sounds, videos
from peft_crome.data.doctor import examine, write_fixed
from peft_crome.data.media import media_of
from peft_crome.data.sounds import read_sound, resampled, sound_header
from peft_crome.data.taken import check_rows
from peft_crome.data.videos import first_frame, read_video, video_header
from tests.recordings import write_frames, write_sound, write_video

ANSWER = {"from": "gpt", "value": "A cat."}
Row = dict[str, Any]


def asked(question: str) -> list[Row]:
    return [{"from": "human", "value": question}, ANSWER]


def read(tmp_path: Path, *rows: Row) -> list[Row]:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return list(read_rows(tmp_path / "rows.json"))


def parts(row: Row) -> list[str]:
    return [part.get("text") or f"<{part['type']}>" for part in row["messages"][0]["content"]]


CHAT = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "conversations": asked("<video>\nWhat?")},
        {"videos": ["a.mp4"], "conversations": asked("<VIDEO>\nWhat?")},
        {"video_path": "a.mp4", "conversations": asked("What?")},
        {"video": "a.mp4", "conversations": asked("<image>\nWhat?")},  # LLaVA-Video-178K
        {"messages": [{"role": "user", "content": CHAT}, {"role": "assistant", "content": "A cat."}]},
        {
            "videos": [{"path": "a.mp4"}],
            "messages": [{"role": "user", "content": [{"type": "video"}, CHAT[1]]}, ANSWER],
        },
    ],
)
def test_a_video_is_read(row: Row, tmp_path: Path) -> None:
    [found] = read(tmp_path, row)
    assert media_of(found) == {"video": [str(tmp_path / "a.mp4")]}
    assert parts(found) == ["<video>", "What?"]


@pytest.mark.parametrize("field", ["audio", "audios", "audio_path", "speech"])
def test_a_sound_is_read(field: str, tmp_path: Path) -> None:
    [found] = read(tmp_path, {field: "a.wav", "conversations": asked("<audio>\nWhat?")})
    assert media_of(found) == {"audio": [str(tmp_path / "a.wav")]}
    assert parts(found) == ["<audio>", "What?"]


def test_a_list_of_image_files_is_the_frames_of_one_video(tmp_path: Path) -> None:
    frames = ["1.jpg", "2.jpg"]
    expected = {"frames": [str(tmp_path / frame) for frame in frames]}
    one, two, three = read(
        tmp_path,
        {"video": frames, "conversations": asked("<video> What?")},
        {"videos": [frames, "a.mp4"], "conversations": asked("<video><video> What?")},
        {"videos": ["a.mp4", "b.mp4"], "conversations": asked("What?")},
    )
    assert one["videos"] == [expected]
    assert two["videos"] == [expected, str(tmp_path / "a.mp4")]
    assert parts(three) == ["<video>", "<video>", "What?"]


def test_media_stand_where_the_text_shows_them(tmp_path: Path) -> None:
    row = {
        "image": "a.png",
        "video": "a.mp4",
        "audio": "a.wav",
        "conversations": asked("Is <audio> in <video> or <image>?"),
    }
    [found] = read(tmp_path, row)
    assert parts(found) == ["Is ", "<audio>", " in ", "<video>", " or ", "<image>", "?"]
    [found] = read(tmp_path, row | {"conversations": asked("What?")})
    assert parts(found) == ["<image>", "<video>", "<audio>", "What?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"video": "a.mp4", "conversations": asked("<video><video>")},
            "2 <video> and 1 videos. Write one <video> per",
        ),
        ({"audio": ["a.wav", "b.wav"], "conversations": asked("<audio>")}, "1 <audio> and 2 sounds"),
        ({"conversations": asked("<video>\nWhat?")}, "<video> in a turn of the user is not read. Write <image> or"),
        ({"video": "http://x/a.mp4", "conversations": asked("What?")}, "the video .* is an address. Download it"),
        ({"video": "../a.mp4", "conversations": asked("What?")}, "the video path '../a.mp4' leaves"),
        ({"video": [], "videos": [7], "conversations": asked("What?")}, "the video '7' is none; expected a path"),
        (
            {"video": "a.mp4", "conversations": [*asked("<video>")[:1], {"from": "gpt", "value": "<video>"}]},
            "a video stands in a turn from 'gpt'",
        ),
    ],
)
def test_faulty_rows_are_named(row: Row, message: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=f"row 'r': .*{message}"):
        read(tmp_path, {"id": "r", **row})


@pytest.fixture
def with_files(tmp_path: Path) -> Path:
    """Write rows whose files all exist, and return the path of the rows."""
    read(
        tmp_path,
        {"id": "file", "video": "a.mp4", "conversations": asked("What?")},
        {"id": "frames", "video": ["1.jpg", "2.jpg"], "audio": "a.wav", "conversations": asked("What?")},
    )
    for name in ("a.mp4", "1.jpg", "2.jpg", "a.wav"):
        (tmp_path / name).touch()
    return tmp_path / "rows.json"


def test_rows_are_kept_and_their_files_looked_for(with_files: Path, tmp_path: Path) -> None:
    rows = load_rows(with_files)
    assert rows[0]["videos"] == [{"path": str(tmp_path / "a.mp4"), "bytes": None, "frames": []}]
    assert [frame["path"] for frame in rows[1]["videos"][0]["frames"]] == [str(tmp_path / f"{n}.jpg") for n in (1, 2)]
    check_files(rows)


@pytest.mark.parametrize(
    "rows_of",
    [load_rows, lambda path: list(load_rows(path)), lambda path: list(read_rows(path))],
    ids=["loaded", "loaded, as a list", "read"],
)
@pytest.mark.parametrize(("name", "kind"), [("a.mp4", "video"), ("2.jpg", "video"), ("a.wav", "sound")])
def test_a_file_that_is_missing_is_named(name: str, kind: str, rows_of: Any, with_files: Path) -> None:
    rows = rows_of(with_files)
    with_files.with_name(name).unlink()
    with pytest.raises(ValueError, match=f"the {kind} .*{name} is missing"):
        check_files(rows)


def test_columns_of_data_sets(tmp_path: Path) -> None:
    """A table with a column of videos and one of sounds, as on the Hub, is read with its bytes unchanged."""
    stored = {"clip": [{"path": None, "bytes": b"film"}], "sound": [{"path": None, "bytes": b"tone"}]}
    table = Dataset.from_dict({"q": ["What?"], "a": ["A cat."], **stored})
    table.cast_column("clip", Video()).cast_column("sound", Audio()).save_to_disk(tmp_path / "saved")
    columns = {"question": "q", "answer": "a", "video": "clip", "audio": "sound"}
    [row] = load_rows(tmp_path / "saved", columns=columns)
    assert (row["videos"][0]["bytes"], row["audio"][0]["bytes"]) == (b"film", b"tone")


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_model_that_takes_none_refuses_the_row_by_name(kind: str, processor: Any, tmp_path: Path) -> None:
    [row] = read(tmp_path, {"id": "r", kind: "a.file", "conversations": asked("What?")})
    noun = {"video": "video", "audio": "sound"}[kind]
    with pytest.raises(RowError, match=f"Row 'r': CromeVLMProcessor takes no {noun}. Take the row out"):
        ConversationCollator(processor)([row])


def test_a_model_that_hears_alone_refuses_an_image(tmp_path: Path) -> None:
    class Hears:
        feature_extractor = SimpleNamespace(sampling_rate=16_000)

    with pytest.raises(RowError, match="Row 'r': Hears takes no image"):
        check_rows(read(tmp_path, {"id": "r", "image": "a.png", "conversations": asked("What?")}), Hears())


# ---- decoding ----


@pytest.fixture
def _decoders() -> None:
    pytest.importorskip("av", reason="videos need PyAV")
    pytest.importorskip("soundfile", reason="sound needs soundfile")


GIVEN_AS: dict[str, Any] = {"path": str, "bytes": lambda path: {"path": None, "bytes": path.read_bytes()}}


@pytest.mark.usefixtures("_decoders")
@pytest.mark.parametrize("given_as", GIVEN_AS)
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv"])
def test_a_header_tells_what_a_video_is(name: str, given_as: str, tmp_path: Path) -> None:
    """The length, rate and size of a video are read. WebM and Matroska do not store the number of frames."""
    given = GIVEN_AS[given_as](write_video(tmp_path / name, frames=9, width=96, height=64, rate=3))
    found = video_header(given, "x")
    assert (found.total_num_frames, found.fps, found.width, found.height, found.duration) == (9, 3.0, 96, 64, 3.0)
    frames, metadata = read_video(given, "x", lambda metadata: [0, 4, 4, 8])
    assert frames.shape == (4, 64, 96, 3)
    assert (frames[1] == frames[2]).all()
    assert (frames[0] != frames[3]).any()
    assert list(metadata.frames_indices) == [0, 4, 4, 8]


@pytest.mark.usefixtures("_decoders")
def test_frames_in_files_are_all_read(tmp_path: Path) -> None:
    files = [str(path) for path in write_frames(tmp_path)]
    frames, metadata = read_video({"frames": files}, "x", first_frame)
    assert frames.shape == (4, 64, 96, 3)
    assert (metadata.total_num_frames, metadata.fps) == (4, None)
    write_frames(tmp_path, 1, width=32)
    with pytest.raises(ValueError, match="x: the frames of a video are 32 x 64, 96 x 64 pixels large"):
        read_video({"frames": files}, "x", first_frame)


@pytest.mark.usefixtures("_decoders")
@pytest.mark.parametrize("given_as", GIVEN_AS)
def test_a_sound_is_one_channel_at_the_models_rate(given_as: str, tmp_path: Path) -> None:
    given = GIVEN_AS[given_as](write_sound(tmp_path / "a.wav", 0.5, 44_100, channels=2))
    assert sound_header(given, "x") == (22_050, 44_100)
    samples = read_sound(given, "x", 16_000)
    assert samples.shape == (resampled(22_050, 44_100, 16_000),) == (8_000,)
    assert samples.dtype == np.float32


@pytest.mark.usefixtures("_decoders")
@pytest.mark.parametrize(
    ("name", "content"),
    [("words.mp4", b"not a video"), ("empty.mp4", b""), ("sound.mp4", None)],
    ids=["words", "empty", "sound"],
)
def test_videos_that_cannot_be_read_are_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is None:
        content = write_sound(tmp_path / "a.wav").read_bytes()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"x: cannot read the video .*{name} \(.+\). Replace the file or drop the"):
        video_header(str(tmp_path / name), "x")


@pytest.mark.usefixtures("_decoders")
def test_a_video_that_is_not_there_or_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the file does not exist"):
        video_header(str(tmp_path / "none.mp4"), "x")
    path = write_video(tmp_path / "cut.mp4", frames=40)
    whole = path.read_bytes()
    start = whole.index(b"mdat") + 2000
    path.write_bytes(whole[:start] + bytes(len(whole) - start - 1500) + whole[-1500:])  # the index at the end stays
    with pytest.raises(ValueError, match=r"cut.mp4 \("):
        read_video(str(path), "x", lambda metadata: range(metadata.total_num_frames))


@pytest.mark.usefixtures("_decoders")
@pytest.mark.parametrize(
    ("name", "content"), [("words.wav", b"not a sound"), ("none.wav", b"")], ids=["words", "empty"]
)
def test_sounds_that_cannot_be_read_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"x: cannot read the sound .*{name} \(.+\). Replace the file or drop the"):
        sound_header(str(tmp_path / name), "x")


@pytest.mark.usefixtures("_decoders")
def test_a_sound_without_samples_is_named(tmp_path: Path) -> None:
    write_sound(tmp_path / "silent.wav", seconds=0)
    with pytest.raises(ValueError, match=r"silent.wav \(it has no samples\)"):
        read_sound(str(tmp_path / "silent.wav"), "x", 16_000)


@pytest.mark.usefixtures("_decoders")
def test_the_doctor_reports_videos_and_sounds(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=9, rate=3)
    write_frames(tmp_path)
    write_sound(tmp_path / "a.wav", 2.5, 8_000)
    write_sound(tmp_path / "silent.wav", seconds=0)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    rows = [
        {"id": "video", "video": "a.mp4", "conversations": asked("What?")},
        {"id": "frames", "video": [f"frame{n}.png" for n in range(4)], "conversations": asked("What?")},
        {"id": "sound", "audio": "a.wav", "conversations": asked("What?")},
        {"id": "broken", "video": "broken.mp4", "conversations": asked("What?")},
        {"id": "silent", "audio": "silent.wav", "conversations": asked("What?")},
        {"id": "missing", "video": "none.mp4", "conversations": asked("What?")},
    ]
    read(tmp_path, *rows)
    findings = examine(tmp_path / "rows.json")
    found = {patient.name: patient.faults[0].kind for patient in findings.patients}
    assert found == {"broken": "unreadable", "silent": "unreadable", "missing": "missing"}
    assert findings.histograms["frames in a video"] == {16: 1, 4: 1}
    assert findings.histograms["seconds of videos"] == {4: 1}
    assert findings.histograms["seconds of sounds"] == {4: 1}
    assert findings.histograms["samples a second of sounds"] == {8_000: 1}
    assert write_fixed(tmp_path / "rows.json", tmp_path / "fixed.json", findings) == (3, 0)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "rows.json")])
    assert result.exit_code == 1
    for words in ("cannot read the video", "none.mp4 is missing", "it has no samples", "samples a second of sounds"):
        assert words in result.stdout, words


@pytest.mark.parametrize(("kind", "package"), [("video", "av"), ("audio", "soundfile")])
def test_a_missing_package_is_named(kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos.import_utils, "is_av_available", lambda: False)
    monkeypatch.setattr(videos.import_utils, "is_torchcodec_usable", lambda decode: False)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a").touch()
    with pytest.raises(ImportError, match=rf"needs '{package}'.*pip install \"peft-crome\[media\]\""):
        (video_header if kind == "video" else sounds.sound_header)(str(tmp_path / "a"), "x")
    read(tmp_path, {kind: "a", "conversations": asked("What?")})
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "rows.json")])
    assert result.exit_code == 1
    assert "peft-crome[media]" in result.output


@pytest.mark.parametrize(
    "field", [{"speech": {"array": [0.0, 0.1], "sampling_rate": 16000}}, {"audio_data": [0.0]}, {"video_data": [[1]]}]
)
def test_a_field_of_sound_or_video_without_files_is_refused(field: Row, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"hold no files. Write paths or bytes into 'videos' or 'audio'"):
        read(tmp_path, {**field, "conversations": asked("What?")})


def test_a_moving_gif_is_a_video_and_no_frame(tmp_path: Path) -> None:
    [row] = read(tmp_path, {"videos": ["a.gif", "b.gif"], "conversations": asked("<video> <video>\nWhat?")})
    assert row["videos"] == [str(tmp_path / "a.gif"), str(tmp_path / "b.gif")]


def test_frames_given_by_their_content_are_one_video(tmp_path: Path) -> None:
    buffers = [io.BytesIO() for _ in range(3)]
    for number, buffer in enumerate(buffers):
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(buffer, "JPEG")
    frames = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    turns = [{"from": "human", "value": "What?"}, ANSWER]
    Dataset.from_list([{"video": frames, "conversations": turns}]).to_parquet(tmp_path / "rows.parquet")
    [row] = read_rows(tmp_path / "rows.parquet")
    assert row["videos"] == [{"frames": frames}]
    load_rows(tmp_path / "rows.parquet").save_to_disk(tmp_path / "saved")
    [again] = load_rows(tmp_path / "saved")
    assert [frame["bytes"] for frame in again["videos"][0]["frames"]] == [frame["bytes"] for frame in frames]
