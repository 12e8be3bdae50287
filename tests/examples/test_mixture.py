"""Test training on two real data sets in one recipe, from the command line and with real weights."""

import json

import pytest

from examples.mixture import experiment as mixture


@pytest.mark.slow
def test_both_sets_are_learned(tmp_path, monkeypatch):
    """Fine-tuning improves the answers to easy-VQA, and the model answers questions about digits with digit words. The
    scores at full size are in `benchmarks/results/mixture`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the stages' own processes: other tests run beside them
    results = mixture.run(tmp_path, {"pretrain": 60, "finetune": 80}, rows=8, test_rows=48)
    print(json.dumps(results, indent=1))
    before, after = (results[stage]["easy_vqa"] for stage in ("pretrain", "finetune"))
    assert after["accuracy"] > before["accuracy"] + 3 * after["stderr"], results
    lines = (tmp_path / "finetune-on-digits.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["answer"] in mixture.WORDS for line in lines) > 0.9 * len(lines) == 0.9 * 48
    record = json.loads((tmp_path / "finetune" / "crome_stage.json").read_text())["stages"][-1]
    assert [entry["rows"] for entry in record["data"]][1:] == [mixture.TRAINING_DIGITS]
    assert list((tmp_path / "features").rglob("*.safetensors"))
