"""Test rows with videos and sounds: their batches equal the processor's own, and mixed batches give a finite loss."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.image_utils import load_image
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import load_video

from peft_crome.data import ConversationCollator, read_rows, split_turns
from peft_crome.data.processed import with_template
from tests.recordings import write_frames, write_sound, write_video

from . import FAMILIES, Family

pytest.importorskip("av", reason="videos need PyAV")
pytest.importorskip("soundfile", reason="sound needs soundfile")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # as in test_families.py

Row = dict[str, Any]
SEES = [family for family in FAMILIES.values() if family.video]
HEARS = [family for family in FAMILIES.values() if family.audio]
each_that_sees = pytest.mark.parametrize("family", SEES, ids=lambda family: family.name)
each_that_hears = pytest.mark.parametrize("family", HEARS, ids=lambda family: family.name)
SETTINGS = {"gemma4": {"num_frames": 4}}  # its processor refuses a video with fewer frames than the published 32
APART = {  # models that take no batch of images and videos
    "smolvlm": r"Rows 'image' and 'video': SmolVLMProcessor .*rows_per_device: 1",
    "glm4v": "do not match",
    "molmo2": "provided at the same time",
}
each = pytest.mark.parametrize("family", [*SEES, *(f for f in HEARS if f not in SEES)], ids=lambda f: f.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    write_video(folder / "a.mp4")
    write_video(folder / "b.webm", frames=10, width=64)
    write_frames(folder)
    write_sound(folder / "a.wav")
    write_sound(folder / "b.wav", 0.7, 44_100, channels=2)
    return folder


@pytest.fixture
def by_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers read videos from a path with PyAV. Its default, torchcodec, needs FFmpeg's libraries."""

    def fetch_videos(self: Any, videos: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(videos, list):
            return list(zip(*(fetch_videos(self, video, sample_indices_fn) for video in videos), strict=True))
        return load_video(videos, backend="pyav", sample_indices_fn=sample_indices_fn)

    monkeypatch.setattr(BaseVideoProcessor, "fetch_videos", fetch_videos)


def said(question: str, answer: str = "A red cat.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def rows_of(family: Family, folder: Path) -> list[Row]:
    """Write rows of every kind that a family accepts to a file in LLaVA's form, and return them as `read_rows` gives
    them."""
    frames = [f"frame{number}.png" for number in range(4)]
    image = {"id": "image", "image": "frame0.png", "conversations": said("<image>\nWhat is this?")}
    rows: list[Row] = [{"id": "text", "conversations": said("What is two?")}, image]
    if family.video:
        again = [*said("<video>\nWhat is this?"), *said("Is it a dog?", "No.")]
        rows += [
            {"id": "video", "video": "a.mp4", "conversations": again},
            {"id": "frames", "video": frames, "conversations": said("<video>\nWhat is this?")},
        ]
    if family.audio:
        rows += [
            {"id": "sound", "audio": "a.wav", "conversations": said("<audio>\nWhat is said?")},
            {"id": "stereo", "audio": "b.wav", "conversations": said("Listen: <audio>")},
        ]
    if family.video and family.name != "smolvlm":
        both = said("<video>\n<image>\nWhat differs?")
        rows.append({"id": "both", "video": "a.mp4", "image": "frame1.png", "conversations": both})
    path = folder / f"{family.name}.json"
    path.write_text(json.dumps(rows))
    return list(read_rows(path))


def conversation(row: Row) -> list[dict[str, Any]]:
    """Return the messages as a user gives them to the processor, with paths of videos and sounds in their parts."""
    media = {"image": iter(row["images"]), "video": iter(row["videos"]), "audio": iter(row["audio"])}

    def shown(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        given = next(media[part["type"]])
        if part["type"] == "image":
            given = load_image(given)
        elif isinstance(given, dict):
            given = [load_image(frame) for frame in given["frames"]]
        return {**part, part["type"]: given}

    return [{**message, "content": [shown(part) for part in message["content"]]} for message in row["messages"]]


def processed(processor: Any, row: Row, messages: Sequence[dict[str, Any]] | None = None, **options: Any) -> Any:
    settings = {"processor_kwargs": {"do_sample_frames": False}} if row["id"] == "frames" else {}
    return with_template(processor).apply_chat_template(
        messages or conversation(row), tokenize=True, return_dict=True, return_tensors="pt", **settings, **options
    )


@each
def test_batch_and_labels_are_the_processors_own(
    family: Family, family_checkpoint: Callable[[Family], Path], folder: Path, by_pyav: None
) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family), **SETTINGS.get(family.name, {}))
    collator = ConversationCollator(processor)
    rows = rows_of(family, folder)
    for row in split_turns(rows) if collator.needs_split else rows:
        batch = collator([row])
        if collator.template.writes_prompts_apart:
            expected = processed(processor, row, conversation(row)[:-1], add_generation_prompt=True)
            length = expected["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][:, :length], expected["input_ids"]), row["id"]
            expected = {k: v for k, v in expected.items() if v.shape[:2] != (1, length)}
        else:
            expected = processed(processor, row)
            assert batch.keys() == {*expected.keys(), "labels"}, row["id"]
        for name, value in expected.items():
            assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), (row["id"], name)
        learned = processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0])
        assert row["messages"][-1]["content"][0]["text"] in learned
        encoded = collator.encode(row)  # by the headers alone
        assert encoded["input_ids"] == batch["input_ids"][0].tolist(), row["id"]
        assert encoded["labels"] == batch["labels"][0].tolist(), row["id"]


@each
def test_a_mixed_batch_trains(family: Family, family_checkpoint: Callable[[Family], Path], folder: Path) -> None:
    directory = family_checkpoint(family)
    processor = tf.AutoProcessor.from_pretrained(directory, **SETTINGS.get(family.name, {}))
    collator = pickle.loads(pickle.dumps(ConversationCollator(processor)))  # as in a worker
    model = getattr(tf, family.auto_class).from_pretrained(directory).eval()

    def loss(rows: list[Row]) -> torch.Tensor:
        batch = collator(rows)
        for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
            alone = collator([row])
            length = alone["input_ids"].shape[1]
            assert torch.equal(ids[:length], alone["input_ids"][0]), row["id"]
            assert torch.equal(labels[:length], alone["labels"][0]), row["id"]
        with torch.no_grad():
            return model(**tf.BatchFeature(batch).to(dtype=model.dtype)).loss

    rows = [row for row in rows_of(family, folder) if row["id"] not in ("frames", "stereo")]
    if family.name in APART:
        with pytest.raises(ValueError, match=APART[family.name]):
            loss(rows)
        rows = [row for row in rows if not row["images"]]
    assert torch.isfinite(loss(rows))


@each_that_sees
def test_videos_of_other_lengths_in_a_batch(
    family: Family, family_checkpoint: Callable[[Family], Path], folder: Path
) -> None:
    """Most processors accept videos of different lengths in a batch. For the others, an error names the rows and the
    setting to use."""
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family), **SETTINGS.get(family.name, {}))
    collator = ConversationCollator(processor)
    turns = [{"role": "user", "content": [{"type": "video"}]}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    rows = [
        {"id": name, "images": [], "videos": [str(folder / name)], "messages": turns} for name in ("a.mp4", "b.webm")
    ]
    if family.name in ("llava_onevision", "internvl"):
        with pytest.raises(
            ValueError, match=r"Rows 'a.mp4', 'b.webm': \w+ makes no batch of their videos .*rows_per_device: 1"
        ):
            collator(rows)
    else:
        assert collator(rows)["input_ids"].shape[0] == 2


@pytest.mark.parametrize(("settings", "frames"), [({}, 8), ({"do_sample_frames": True, "fps": 2}, 4)], ids=str)
def test_settings_of_the_processor_choose_frames(
    settings: Row, frames: int, family_checkpoint: Callable[[Family], Path], folder: Path, by_pyav: None
) -> None:
    """The processor's settings choose the frames of a video. By default Qwen2.5-VL takes every frame. Two frames make
    one of its time steps."""
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(FAMILIES["qwen2_5_vl"]), **settings)
    row = next(row for row in rows_of(FAMILIES["qwen2_5_vl"], folder) if row["id"] == "video")
    batch, expected = ConversationCollator(processor)([row]), processed(processor, row)
    assert batch["video_grid_thw"][0, 0] == frames // 2
    assert all(torch.equal(batch[name], torch.as_tensor(value)) for name, value in expected.items())


@each
def test_tokens_are_counted_without_decoding(
    family: Family, family_checkpoint: Callable[[Family], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family), **SETTINGS.get(family.name, {}))
    collator = ConversationCollator(processor)
    for name in ("read_video", "read_sound"):
        monkeypatch.setattr(f"peft_crome.data.media_reader.{name}", lambda *_: pytest.fail("a file was decoded"))
    assert all(collator.encode(row)["length"] > 0 for row in split_turns(rows_of(family, folder)))


def test_gemma_cuts_a_sound_after_30_seconds(family_checkpoint: Callable[[Family], Path], tmp_path: Path) -> None:
    collator = ConversationCollator(tf.AutoProcessor.from_pretrained(family_checkpoint(FAMILIES["gemma3n"])))
    turns = [{"role": "user", "content": [{"type": "audio"}]}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    features = []
    for seconds in (30, 32):
        path = write_sound(tmp_path / f"{seconds}.wav", seconds)
        features.append(
            collator([{"id": "r", "images": [], "audio": [str(path)], "messages": turns}])["input_features"]
        )
    assert features[0].shape == features[1].shape
