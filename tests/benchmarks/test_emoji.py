"""Test the emoji benchmark: the training objects and the held-out ones, the questions, and the report."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import emoji, emoji_data, emoji_trials
from benchmarks.emoji_data import QUESTION, VIEWS, Thing

KINDS = ("bird", "bird", "tool", "drink")
OBJECTS = tuple(Thing(number, KINDS[number % 4], f"{number}.png") for number in range(64))


def test_a_quarter_of_each_kind_is_held_out() -> None:
    train, held_out = emoji_data.split(OBJECTS, seed=3)
    assert sorted(thing.number for thing in train + held_out) == list(range(64))
    assert Counter(thing.kind for thing in held_out) == {"bird": 8, "tool": 4, "drink": 4}
    assert emoji_data.split(OBJECTS, seed=3) == (train, held_out)
    assert emoji_data.split(OBJECTS, seed=4) != (train, held_out)
    assert emoji_data.most_frequent_kind(train) == "bird"


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_rows_show_every_object_before_one_comes_again(stage: str) -> None:
    train, held_out = emoji_data.split(OBJECTS, seed=0)
    rows = emoji_data.rows(train, 2 * len(train), 5, stage)
    shown = [row["image_id"] // VIEWS for row in rows]
    assert sorted(shown[: len(train)]) == sorted(thing.number for thing in train)
    assert not {thing.number for thing in held_out} & set(shown)
    by_number = {thing.number: thing for thing in OBJECTS}
    for number, row in zip(shown, rows, strict=True):
        thing = by_number[number]
        asked = emoji_data.CAPTION_REQUEST if stage == "align" else QUESTION
        assert row["turns"] == [[asked, thing.kind]]
    assert rows == emoji_data.rows(train, 2 * len(train), 5, stage)


def test_questions_ask_for_the_kind() -> None:
    asked = emoji_data.questions(list(OBJECTS))
    assert asked[2] == {"image_id": 2, "question": QUESTION, "answer": "tool"}
    assert len(asked) == 64


def test_drawings_lie_on_white_and_later_views_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 48))
    image.save(folder / "0.png")
    monkeypatch.setattr(emoji_data, "fetch", lambda part: tmp_path)
    views = [emoji_data.drawing("google", OBJECTS[0], view) for view in range(VIEWS)]
    assert views[0].getpixel((63, 63)) == (255, 255, 255)
    assert views[0].getpixel((0, 0)) == (255, 0, 0)
    assert len({view.tobytes() for view in views}) == VIEWS
    assert views[1] == emoji_data.drawing("google", OBJECTS[0], 1)


def record(method: str, seed: int, accuracy: float) -> dict[str, Any]:
    scores = {name: {"accuracy": accuracy, "stderr": 0.03, "n": 181} for name in emoji.TESTS}
    stage = {"seconds": 90, "trained_parameters": 732_672}
    loss = {"adapted": 3.5, "base": 3.5, "cost": 0.0, "cost_stderr": 0.0}
    return {
        "method": method,
        "seed": seed,
        "align": stage,
        "finetune": stage,
        "score": scores,
        "most frequent kind": scores,
        "language": {"text_loss": loss, "answer": "Paris."},
    }


def test_report_has_a_row_per_method_and_what_words_alone_allow(tmp_path: Path) -> None:
    for method, seed, accuracy in (("crome", 0, 0.5), ("crome", 1, 0.6), ("lora", 0, 0.4)):
        emoji.write_json(emoji.file_of(method, seed, tmp_path), record(method, seed, accuracy))
    lines = emoji.write_report(tmp_path).splitlines()
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| most frequent kind",
        f"| {emoji.NAMES['crome']}",
        f"| {emoji.NAMES['lora']}",
    ]
    assert "| 2 | 55.0% (50.0% to 60.0%) |" in lines[3]
    assert "| 1 | 40.0% ± 3.0% |" in lines[4]


def test_a_second_call_runs_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emoji.write_json(emoji.file_of("crome", 0, tmp_path), record("crome", 0, 0.5))
    ran = []

    def run_one(method: str, seed: int, directory: Path, device: str) -> dict[str, Any]:
        ran.append((method, seed))
        return record(method, seed, 0.5)

    monkeypatch.setattr(emoji, "run_one", run_one)
    emoji.main(report=True, seeds=1, output=tmp_path / "output", results=tmp_path, device="cpu")
    assert ran == []
    emoji.main(report=False, seeds=1, output=tmp_path / "output", results=tmp_path, device="cpu")
    assert ran == [(method, 0) for method in emoji.METHODS[1:]]


@pytest.mark.slow
def test_a_run_trains_answers_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.easy_vqa import language

    text = language.english_text()[:3000]
    monkeypatch.setattr(language, "english_text", lambda: text)
    align, finetune = replace(emoji.ALIGN, steps=2), replace(emoji.FINETUNE, steps=2)
    result = json.loads(json.dumps(emoji.run_one("crome", 0, tmp_path, align, finetune, limit=4)))
    assert len(emoji_data.things()) == 725
    assert len({thing.kind for thing in emoji_data.things()}) == 30
    assert result["finetune"]["trained_parameters"] == 732_672
    assert {name: score["n"] for name, score in result["score"].items()} == dict.fromkeys(emoji.TESTS, 4)
    assert result["language"]["text_loss"]["cost"] == 0
    assert result["language"]["answer"] == "The capital of France is Paris."


def test_trials_have_a_row_for_each_setting(tmp_path: Path) -> None:
    """A row has the mean over seeds. Its standard error is that of a mean of independent scores."""
    names = list(emoji_trials.SETTINGS)
    assert len({emoji_trials.file_of(name, 0) for name in names}) == len(names)
    for name, seed, accuracy in ((names[0], 0, 0.5), (names[0], 1, 0.6), (names[2], 0, 0.4)):
        emoji.write_json(emoji_trials.file_of(name, seed, tmp_path), {"name": name, **record("crome", seed, accuracy)})
    lines = emoji_trials.write_report(tmp_path).splitlines()
    assert lines[2].startswith(f"| {names[0]} | 2 | 55.0% ± 2.1% |")
    assert lines[3].startswith(f"| {names[2]} | 1 | 40.0% ± 3.0% |")


@pytest.mark.slow
def test_a_trial_asks_about_training_objects_alone(tmp_path: Path) -> None:
    result = emoji_trials.run("twice the width", 0, tmp_path, limit=8, scale=0.01)
    train, held_out = emoji_data.split(emoji_data.things(), 0)
    asked = {row[0] for row in json.loads((tmp_path / "answers.json").read_text())}
    assert len(asked) == 16
    assert asked < {thing.number for thing in train}
    assert not asked & {thing.number for thing in held_out}
    assert result["finetune"]["trained_parameters"] == 2 * 732_672
    assert "language" not in result
