"""Test that two commands train and score a model on rows with videos and sounds, and that the doctor checks the
rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from peft_crome.cli import app
from tests.recordings import write_frames, write_sound, write_video

from . import FAMILIES

pytest.importorskip("av", reason="videos need PyAV")
pytest.importorskip("soundfile", reason="sound needs soundfile")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

SEE = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm")
HEAR = ("gemma3n", "phi4_multimodal")
STEPS = {
    "max_steps": 4,
    "batch_size": 4,
    "rows_per_device": 4,
    "warmup_steps": 0,
    "learning_rate": 0.02,
    "logging_steps": 1,
}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(2):
        write_video(folder / f"{number}.mp4", frames=8 + 4 * number, width=64 + 32 * number)
        write_video(folder / f"same{number}.mp4", width=64 + 32 * number)
        write_sound(folder / f"{number}.wav", 0.5 + number, 16_000 * (1 + number))
    write_frames(folder)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def rows(kind: str, *files: str) -> list[Row]:
    """Return a row for each file, and one row of text."""
    turns = [{"from": "human", "value": f"<{kind}>\nWhat is this?"}, {"from": "gpt", "value": "A red cat."}]
    said = [{"from": "human", "value": "What is two?"}, {"from": "gpt", "value": "A number."}]
    return [{"id": file, kind: file, "conversations": turns} for file in files] + [
        {"id": "text", "conversations": said}
    ]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def run(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def finetune(model: Path, data: Path, output: Path, **settings: Any) -> Result:
    given = {f"training.{key}": value for key, value in STEPS.items()} | settings
    said = (word for key, value in given.items() for word in ("--set", f"{key}={value}"))
    return run("finetune", model, data, "--output", output, *said)


@pytest.mark.parametrize("name", [*SEE, *HEAR])
def test_two_lines(name: str, family_checkpoint: Callable[[Any], Path], folder: Path, tmp_path: Path) -> None:
    """The adapter learns from videos alone, or from sounds alone. Its loss falls and its weights change."""
    model, output = family_checkpoint(FAMILIES[name]), tmp_path / "adapter"
    kind, ending = ("video", "mp4") if name in SEE else ("audio", "wav")
    same = "same" if name == "llava_onevision" else ""
    data = write(folder / f"{name}.json", rows(kind, f"{same}0.{ending}", f"{same}1.{ending}"))
    doctor = run("doctor", data, "--model", model, "--show", "1")
    assert doctor.exit_code == 0, doctor.output
    assert "tokens in a row" in doctor.stdout
    assert " tokens]" in doctor.stdout
    made = finetune(model, data, output)
    assert made.exit_code == 0, made.output
    losses = [loss for _, loss in json.loads((output / "crome_stage.json").read_text())["stages"][-1]["losses"]]
    assert losses[-1] < losses[0]
    weights = load_file(output / "adapter_model.safetensors")
    assert next(value for key, value in weights.items() if "crome_up" in key).any()
    scored = run("evaluate", output, data, "--max-new-tokens", "2", "--output", tmp_path / "answers.jsonl")
    assert scored.exit_code == 0, scored.output
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma4"])
def test_images_videos_and_sounds_in_one_run(
    name: str, family_checkpoint: Callable[[Any], Path], folder: Path, tmp_path: Path
) -> None:
    model, output = family_checkpoint(FAMILIES[name]), tmp_path / "adapter"
    shown = rows("video", "0.mp4") + rows("image", "frame0.png")[:1]
    shown += rows("audio", "0.wav")[:1] if name in HEAR or name == "gemma4" else []
    settings = {"model.processor": "{num_frames: 4}"} if name == "gemma4" else {}
    data = write(folder / f"{name}.json", shown)
    made = finetune(model, data, output, **settings)
    assert made.exit_code == 0, made.output
    scored = run("evaluate", output, data, "--max-new-tokens", "2", "--output", tmp_path / "answers.jsonl")
    assert scored.exit_code == 0, scored.output
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(shown)


@pytest.mark.parametrize("command", ["finetune", "evaluate", "doctor"])
@pytest.mark.parametrize(("kind", "file"), [("video", "0.mp4"), ("audio", "0.wav")])
def test_a_model_that_takes_none_is_not_loaded(
    command: str,
    kind: str,
    file: str,
    family_checkpoint: Callable[[Any], Path],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = family_checkpoint(FAMILIES["llava"]), write(folder / "none.json", rows(kind, file))
    monkeypatch.setattr("peft_crome.training.model.host.read_model", lambda *_: pytest.fail("weights were loaded"))
    message = f"Row '{file}': LlavaProcessor takes no {'video' if kind == 'video' else 'sound'}."
    if command == "finetune":
        made = finetune(model, data, tmp_path / "adapter")
    elif command == "evaluate":
        made = run("evaluate", model, data)
    else:
        made = run("doctor", data, "--model", model)
    assert made.exit_code == 1
    assert message.removeprefix(f"Row '{file}': ") in made.output, made.output
    assert file in made.output


def test_a_broken_video_stops_training_and_the_doctor_names_it(
    family_checkpoint: Callable[[Any], Path], folder: Path, tmp_path: Path
) -> None:
    model, data = (
        family_checkpoint(FAMILIES["qwen3_vl"]),
        write(folder / "broken.json", rows("video", "broken.mp4", "0.mp4")),
    )
    doctor = run("doctor", data, "--model", model)
    assert doctor.exit_code == 1
    assert "; 1 faulty." in doctor.output
    assert "cannot read the video" in doctor.output
    made = finetune(model, data, tmp_path / "adapter")
    assert made.exit_code == 1
    assert "Row 'broken.mp4': cannot read the video" in made.output
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["molmo2", "glm4v", "smolvlm"])
def test_a_model_that_takes_no_images_beside_videos_says_so(
    name: str, family_checkpoint: Callable[[Any], Path], folder: Path, tmp_path: Path
) -> None:
    model = family_checkpoint(FAMILIES[name])
    data = write(folder / "both.json", rows("video", "0.mp4")[:1] + rows("image", "frame0.png")[:1])
    made = finetune(model, data, tmp_path / "adapter")
    assert made.exit_code == 1
    said = " ".join(made.output.split())
    assert "ows '0.mp4', 'frame0.png'" in said or "Rows 'frame0.png' and '0.mp4'" in said, said
    assert "training.rows_per_device" in said
    made = finetune(model, data, tmp_path / "adapter", **{"training.rows_per_device": 1})
    assert made.exit_code == 0, made.output


def test_the_processor_chooses_as_many_frames_of_each(
    family_checkpoint: Callable[[Any], Path], folder: Path, tmp_path: Path
) -> None:
    model, data = (
        family_checkpoint(FAMILIES["llava_onevision"]),
        write(folder / "two.json", rows("video", "0.mp4", "1.mp4")),
    )
    made = finetune(model, data, tmp_path / "adapter")
    assert made.exit_code == 1
    assert "makes no batch of their videos" in made.output
    made = finetune(
        model, data, tmp_path / "adapter", **{"model.processor": "{do_sample_frames: true, num_frames: 8}"}
    )
    assert made.exit_code == 0, made.output
