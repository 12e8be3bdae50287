"""Test that two processes train as one does: they have the same losses and the same adapter, which is written once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.processes import batches, run
from tests.training.test_resume import state


def losses(directory: str | Path) -> list[float]:
    record = json.loads((Path(directory) / "crome_stage.json").read_text())["stages"][-1]
    return [loss for _, loss in record["losses"]]


@pytest.fixture
def quiet(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without dropout, which would differ between processes. The last batch of each epoch is not
    full."""
    recipe["adapter"]["dropout"] = 0.0
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    recipe["backbones"]["qformer"] = {**recipe["backbones"]["qformer"], **still}
    recipe["training"] |= {"rows_per_device": None, "max_steps": 8, "save_steps": 100}
    return recipe


def assert_same_run(values: dict[str, Any], tmp_path: Path, **two: Any) -> None:
    """Train on one process and on two, and compare the losses of each step and the written files."""
    outputs = []
    for processes in (1, 2):
        output = tmp_path / f"by-{processes}"
        log = tmp_path / f"by-{processes}.log"
        codes = run({**values, "output": str(output)}, log, processes=processes, **(two if processes == 2 else {}))
        assert codes == [0] * processes, Path(f"{log}.0").read_text()[-3000:]
        outputs.append(output)
    assert losses(outputs[1]) == pytest.approx(losses(outputs[0]), rel=2e-5)
    one, both = (state(output) for output in outputs)
    assert one.keys() == both.keys()
    for key, value in one.items():
        assert both[key].shape == value.shape
        torch.testing.assert_close(both[key], value, rtol=0, atol=2e-4)  # Adam divides small numbers by small numbers
    assert sorted(path.name for path in outputs[0].iterdir()) == sorted(path.name for path in outputs[1].iterdir())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"rows_per_device": 1},
    "checkpointed": {"gradient_checkpointing": True},
    "with the Q-Former": {},
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_losses_of_one(name: str, quiet: dict[str, Any], tmp_path: Path) -> None:
    """Two processes have the losses of one, with answers of different lengths and an uneven last batch."""
    quiet["training"] |= CASES[name]
    if name == "with the Q-Former":  # some of its weights see what no loss depends on
        quiet["stage"] = "instruct"
    assert_same_run(quiet, tmp_path)
    mixed = batches(tmp_path / "by-2.log")
    assert {rank for rank, _ in mixed} == {0, 1}


def test_two_processes_have_the_losses_of_one_for_an_encoder_decoder(
    quiet: dict[str, Any], seq2seq_backbone: str, tmp_path: Path
) -> None:
    config = json.loads((Path(seq2seq_backbone) / "config.json").read_text())
    assert config["dropout_rate"], "the test takes it out"
    still = tmp_path / "still"
    still.mkdir()
    for file in Path(seq2seq_backbone).iterdir():
        (still / file.name).write_bytes(file.read_bytes())
    (still / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    quiet["backbones"]["language"] = str(still)
    quiet["chat_template"] = "t5"
    assert_same_run(quiet, tmp_path)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_images_in_one_process_and_text_alone_in_the_other(
    checkpointed: bool, quiet: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes train a text branch as one does, on a stream of rows with an image and rows of text alone."""
    for key in ("qformer", "qformer_tokenizer", "num_query_tokens"):
        del quiet["backbones"][key]
    quiet["adapter"]["branches"] = ["text", "vision"]
    quiet["training"]["gradient_checkpointing"] = checkpointed
    source = Path(quiet["data"][0]["path"])
    rows = json.loads(source.read_text())
    imaged = [row for row in rows if "image" in row]
    text = [row for row in rows if "image" not in row]
    order = [imaged[0], text[0], text[1], imaged[1], text[0], text[1], imaged[2], text[0]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in order))
    # Streamed, rows come in the order of the file: one to each process.
    quiet["data"] = [{"path": str(tmp_path / "rows.jsonl"), "images": str(source.parent), "streaming": True}]
    quiet["training"] |= {"batch_size": 2, "rows_per_device": 1}
    assert_same_run(quiet, tmp_path)
    assert len(batches(tmp_path / "by-2.log")) == 16
    assert "are left out" not in (tmp_path / "by-2.log.0").read_text()
