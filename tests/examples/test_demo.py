"""Test the demo's records: which runs are done, and the table that the records give."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.easy_vqa import data, demo

QUESTIONS = [
    {"question": "what shape is present?", "answer": "circle", "image_id": 0, "kind": "what"},
    {"question": "is there a red shape?", "answer": "yes", "image_id": 0, "kind": "yes/no"},
]


def record(method: str, seed: int, cost: float | None) -> dict[str, Any]:
    stage = {"seconds": 60, "trained_parameters": 10, "losses": [[10, 1.0], [20, 0.5]]}
    scores = {kind: {"accuracy": 0.9, "stderr": 0.01, "n": 100} for kind in data.KINDS}
    groups = {group: {"accuracy": 0.9, "stderr": 0.01, "n": 100} for group in data.YES_NO_GROUPS}
    result = {"method": method, "seed": seed, "align": stage, "finetune": stage, "score": scores, "yes_no": groups}
    if cost is not None:
        loss = {"adapted": 3.5 + cost, "base": 3.5, "cost": cost, "cost_stderr": 0.001}
        result["language"] = {"text_loss": loss, "answer": "4" if cost else "Paris.", "base_answer": "Paris."}
    return result


def test_a_record_without_the_measurement_on_text_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert not demo.is_done(file, "projection")
    file.write_text(json.dumps(record("lora", 0, None)))
    assert not demo.is_done(file, "lora")
    assert demo.is_done(file, "projection")  # attaches nothing to the language model
    file.write_text(json.dumps(record("lora", 0, 0.25)))
    assert demo.is_done(file, "lora")


def test_table_has_accuracy_beside_what_the_language_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_questions", lambda split: QUESTIONS)
    runs = [("crome", 0, 0.0), ("lora", 0, 0.25), ("lora", 1, None), ("projection", 0, None)]
    for method, seed, cost in runs:
        (tmp_path / f"{method}-seed{seed}.json").write_text(json.dumps(record(method, seed, cost)))
    demo.summarize(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    table = lines[: lines.index("")]
    assert len({line.count("|") for line in table}) == 1
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in table}
    row = cells[demo.NAMES["crome"]]
    assert row[1:7] == ["1", "90.0% ± 1.0%", "90.0% ± 1.0%", "3.500 (+0.000 ± 0.001)", "3.500", '"Paris."']
    assert cells[demo.NAMES["lora"]][4] == "3.750 (+0.250 ± 0.001)"
    assert cells[demo.NAMES["lora"]][6] == '"4"'
    assert cells[demo.NAMES["projection"]][4:7] == ["3.500 (nothing attached)", "3.500", '"Paris."']
    assert (tmp_path / "learning_curves.png").stat().st_size > 5_000
