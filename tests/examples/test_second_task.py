"""Test that one command teaches a second task to a model with vision, with real weights and unchanged text."""

import json

import pytest

from examples.mixture.experiment import WORDS
from examples.second_task import experiment as second_task


@pytest.mark.slow
def test_the_second_task_is_answered_and_text_costs_nothing(tmp_path, monkeypatch):
    """The adapter answers the second task with digit words, and the loss on text stays that of the base model. The
    scores at full size are in `docs/finetune.md`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the commands' own processes: other tests run beside them
    results = second_task.run(tmp_path, steps=40, rows=8, test_rows=48, text="The sun rose over the hills. " * 60)
    said = {}
    for name in ("model-that-sees", "digits-adapter"):
        lines = (tmp_path / f"{name}-on-digits.jsonl").read_text().splitlines()
        said[name] = sum(json.loads(line)["answer"] in WORDS for line in lines)
    assert said["digits-adapter"] > 0.9 * 48 > said["model-that-sees"]
    assert results["text_loss"]["adapted"] == results["text_loss"]["base"]
    assert set(results["scores"]) == {"digits", "easy_vqa"}
    assert second_task.run(tmp_path, steps=40, rows=8, test_rows=48) == results  # nothing is done again
