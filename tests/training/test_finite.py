"""Test that a loss or gradient that is not finite stops the run before the weights change and names its rows."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import DistributedType

from peft_crome.training import CromeTrainer, NotFiniteError, load_recipe, train
from peft_crome.training.loop.finite import LONGEST_ID, FiniteCheck, decode_ids, encode_ids


def test_ids_go_through_tensors() -> None:
    ids = ["7", "text-1", "coco/train2017/000000033471.jpg", "Bild ä", "x" * 500]
    assert decode_ids(encode_ids(ids)) == [*ids[:-1], "x" * LONGEST_ID]
    assert encode_ids(ids).dtype == torch.uint8


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Make the loss, or the gradient of one weight, NaN at a step counted from 1."""
    compute = CromeTrainer.compute_loss

    def spoilt(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        assert "row_ids" not in inputs
        if self.state.global_step + 1 != step:
            return loss
        if what == "the loss":
            return loss * float("nan")
        parameter = next(p for p in model.parameters() if p.requires_grad)
        return loss + (0 * parameter).sum().sqrt()  # 0, and its gradient is infinite times 0

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            batches.append(decode_ids(args[1]["row_ids"]))
            before.append([p.detach().clone() for p in self.model.parameters() if p.requires_grad])
            models.append(self.model)
        return original(self, *args, **kwargs)

    batches: list[list[str]] = []
    before: list[list[torch.Tensor]] = []
    models: list[Any] = []
    original = CromeTrainer.training_step
    monkeypatch.setattr(CromeTrainer, "compute_loss", spoilt)
    monkeypatch.setattr(CromeTrainer, "training_step", seen)
    monkeypatch.setattr(sys.modules[__name__], "SEEN", (batches, before, models), raising=False)


SEEN: Any = None


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("what", ["the loss", "the gradient"])
def test_step_rows_data_and_checkpoint_are_named(
    what: str, accumulated: bool, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 5, what)
    values["training"]["rows_per_device"] = 2 if accumulated else 4
    with pytest.raises(NotFiniteError) as error:
        train(load_recipe(values))
    batches, before, models = SEEN
    rows = [name for names in batches for name in names]
    assert len(batches) == (2 if accumulated else 1)
    assert error.value.step == 5
    assert error.value.rows == rows
    message = str(error.value)
    assert message.startswith(f"Step 5: {what} is NaN or infinite, from the rows '{rows[0]}'")
    assert f"of {values['data'][0]['path']}" in message
    checkpoints = Path(values["output"] + ".checkpoints")
    assert f"{checkpoints / 'checkpoint-3'}, is from before it" in message
    assert (checkpoints / "checkpoint-3" / "trainer_state.json").is_file()
    assert not Path(values["output"]).exists()
    after = [p for p in models[0].parameters() if p.requires_grad]
    assert all(torch.equal(old, new) for old, new in zip(before[0], after, strict=True))


def test_only_the_set_that_holds_the_rows_is_named(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "\n".join(json.dumps({"id": f"table-{i}", "q": f"w{i}", "a": "w9"}) for i in range(40))
    (tmp_path / "table.jsonl").write_text(table)
    columns = {"question": "q", "answer": "a", "id": "id"}
    values["data"] = [{"path": str(tmp_path / "table.jsonl"), "columns": columns}, *values["data"]]
    values["training"] |= {"batch_size": 1}
    spoil(monkeypatch, 1, "the loss")
    with pytest.raises(NotFiniteError, match=r"No checkpoint was written") as error:
        train(load_recipe(values))
    held = "table.jsonl" if error.value.rows[0].startswith("table-") else "rows.json"
    assert [Path(path).name for path in error.value.paths] == [held]


def test_a_learning_rate_that_is_far_too_high(values: dict[str, Any]) -> None:
    values["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 20, "warmup_steps": 0}
    with pytest.raises(NotFiniteError, match=r"Step \d+: the (loss|gradient) is NaN or infinite, from the rows"):
        train(load_recipe(values))


RUN = """
import json, os, sys
from peft_crome.training import CromeTrainer, EvaluationCallback, NotFiniteError, generate_answers, load_recipe, train
compute = CromeTrainer.compute_loss
answers = EvaluationCallback._answers

def told(self, rows):
    shared = answers(self, rows)
    alone = generate_answers(self.trainer.model, self.processor, rows, max_new_tokens=2, progress=False)
    tell({"same": shared == alone, "answers": len(shared), "different": len(set(shared)) > 1})
    return shared

def tell(what):
    # Of a file per process: lines that two processes print come out mixed where Python does not buffer.
    with open(sys.argv[2] + os.environ["RANK"], "a") as file:
        print(json.dumps(what), file=file)

EvaluationCallback._answers = told

def spoilt(self, model, inputs, *args, **kwargs):
    loss = compute(self, model, inputs, *args, **kwargs)
    return loss * float("nan") if os.environ["RANK"] == "1" and self.state.global_step == 4 else loss

CromeTrainer.compute_loss = spoilt
try:
    train(load_recipe(sys.argv[1]))
except NotFiniteError as error:
    tell(str(error))
"""


@pytest.mark.slow
def test_all_processes_stop_and_share_the_questions(values: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    """A NaN loss in one of two gloo processes stops both and names its rows. The processes share five questions of an
    evaluation, and all of them are scored."""
    values["training"]["arguments"]["use_cpu"] = True
    values["evaluation"] = {"data": [{"path": str(dataset)}], "steps": 2, "max_rows": 5, "max_new_tokens": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "run.py").write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / "told-")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    told = [list(map(json.loads, (tmp_path / f"told-{rank}").read_text().splitlines())) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0][:-1] == [{"same": True, "answers": 5, "different": True}] * 2  # steps 2 and 4
    assert "Step 5: the loss is NaN or infinite" in told[0][-1]
    assert "checkpoint-3, is from before it" in told[0][-1]
    state = json.loads((Path(values["output"] + ".checkpoints") / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_rows_exact_match" in entry] == [2]


@pytest.mark.parametrize(
    ("loss", "scale", "stops"),
    [(1.0, 65536.0, None), (float("nan"), 65536.0, "the loss"), (1.0, 2.0**-15, "the gradient")],
)
def test_overflow_of_a_gradient_under_fp16_is_the_scalers(loss: float, scale: float, stops: str | None) -> None:
    """An overflow of the gradient under fp16 is left to the scaler, which skips the step and halves its scale. At the
    smallest scale it stops the run. PyTorch scales on GPUs alone, so a stand-in is used."""
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    accelerator = SimpleNamespace(scaler=scaler, num_processes=1, distributed_type=DistributedType.NO)
    check = FiniteCheck()
    check.see(torch.tensor(loss), encode_ids(["7"]))
    if stops is None:
        check.check(torch.tensor(float("inf")), accelerator, 1, "nowhere")
        return
    with pytest.raises(NotFiniteError, match=f"Step 1: {stops} is NaN or infinite, from the rows '7'. The run"):
        check.check(torch.tensor(float("inf")), accelerator, 1, "nowhere")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_deepspeed_scales_an_fp16_loss_itself(precision: str) -> None:
    accelerator = SimpleNamespace(
        scaler=None, num_processes=1, distributed_type=DistributedType.DEEPSPEED, mixed_precision=precision
    )
    check = FiniteCheck()
    check.see(torch.tensor(1.0), encode_ids(["7"]))
    with nullcontext() if precision == "fp16" else pytest.raises(NotFiniteError, match="Step 1: the gradient"):
        check.check(float("inf"), accelerator, 1, "nowhere")
