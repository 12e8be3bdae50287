"""Test that a trial validates on images that it does not train on, and that it writes its scores."""

import json
from dataclasses import replace

import pytest

from examples.easy_vqa import data, trial
from examples.easy_vqa.training import easy_vqa_rows


def test_no_image_is_on_both_sides():
    questions = [{"image_id": number % 40, "question": "?", "answer": "red", "kind": "what"} for number in range(100)]
    train, validation = trial.split(questions)
    assert {row["image_id"] for row in validation} == {0, 10, 20, 30}
    assert len(train) + len(validation) == len(questions)
    assert not {row["image_id"] for row in train} & {row["image_id"] for row in validation}


@pytest.mark.slow
def test_a_trial_trains_on_the_rest_and_writes_its_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "QUESTIONS", {"what": 2, "yes/no": 4})
    align = replace(trial.ALIGN, steps=2, images_per_step=2)
    draws = (("affirmative", 1), ("any", 1))
    tune = replace(trial.FINETUNE, steps=2, images_per_step=2, draws=draws, learning_rate=3e-3)
    train, _ = trial.split(data.load_questions("train"))
    assert all(row["image_id"] % trial.VALIDATION for row in easy_vqa_rows(tune, 0, train))
    file = tmp_path / "results" / "crome.json"
    record = trial.run(tmp_path / "runs", file, "crome-wide", align=align, tune=tune)
    assert json.loads(file.read_text())["score"]["yes/no"]["n"] == 4
    assert record["finetune"]["settings"]["learning_rate"] == 3e-3
    assert record["finetune"]["trained_parameters"] == 2 * 732_672
