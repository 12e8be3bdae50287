"""Test weights divided between two processes by FSDP2: equal losses, checkpoints, and one whole stage at the end.

accelerate divides weights on accelerators alone. On CPUs it leaves FSDP out without a warning, so `_shard` makes it
divide them in these tests. Its plugin and the Trainer's checkpoints are as on GPUs, with gloo and `fully_shard`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_crome.training import RecipeError, read_record
from peft_crome.training.loop.sharding import check_storage
from peft_crome.training.quantization import load_config
from tests.training.processes import KILLED, batches, run
from tests.training.test_resume import state

# What examples/accelerate/fsdp2.yaml says, as `accelerate launch` hands it on.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.fixture
def recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of two epochs with eight rows a step. The last step of each epoch is not full."""
    values["training"] |= {"batch_size": 8, "rows_per_device": 2, "max_steps": 4, "learning_rate": 3e-3}
    return values


def sharded(values: dict[str, Any], log: Path, **arguments: Any) -> list[int | None]:
    return run(values, log, processes=2, sharded=FSDP2, **arguments)


@pytest.mark.parametrize("name", ["float32", "bfloat16 backbones, no Q-Former, checkpointing"])
def test_divided_weights_learn_as_whole_ones(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    if name != "float32":
        for key in ("qformer", "qformer_tokenizer", "num_query_tokens"):
            del recipe["backbones"][key]
        recipe["backbones"]["dtype"] = "bfloat16"
        recipe["training"]["gradient_checkpointing"] = True
    one, two = ({**recipe, "output": str(tmp_path / name)} for name in ("one", "two"))
    assert run(one, tmp_path / "one.log") == [0], (tmp_path / "one.log.0").read_text()[-3000:]
    assert sharded(two, tmp_path / "two.log") == [0, 0], (tmp_path / "two.log.0").read_text()[-3000:]
    records = [read_record(tmp_path / name)["stages"][-1] for name in ("one", "two")]
    assert records[0]["trained"] == records[1]["trained"]
    tolerance = 1e-4 if name == "float32" else 2e-2
    expected, found = (torch.tensor(record["losses"]) for record in records)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    whole, gathered = state(tmp_path / "one"), state(tmp_path / "two")
    assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in gathered.items()}
    assert {key: value.dtype for key, value in whole.items()} == {key: value.dtype for key, value in gathered.items()}
    if name == "float32":
        for key, value in whole.items():
            torch.testing.assert_close(gathered[key], value, rtol=1e-2, atol=2e-4, msg=key)


def test_divided_run_goes_on_where_it_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"] |= {"save_steps": 2, "max_steps": 5}
    recipe["adapter"]["dropout"] = 0.1
    plain = {**recipe, "output": str(tmp_path / "plain")}
    assert sharded(plain, tmp_path / "plain.log") == [0, 0]
    assert sharded(recipe, tmp_path / "killed.log", kill_at=3)[0] == KILLED
    assert sharded(recipe, tmp_path / "killed.log") == [0, 0], (tmp_path / "killed.log.0").read_text()[-3000:]
    assert read_record(recipe["output"])["stages"][-1]["resumed"]
    assert batches(tmp_path / "plain.log") == batches(tmp_path / "killed.log")
    expected, found = state(tmp_path / "plain"), state(Path(recipe["output"]))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_divided_weights_answer_as_whole_ones(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Evaluation during a run gives the same scores with divided weights. It has three rows, so the processes' shares
    are uneven."""
    source = recipe["data"][0]["path"]
    recipe["evaluation"] = {"data": [{"path": source}], "steps": 2, "max_rows": 3, "max_new_tokens": 2}
    recipe["evaluation"]["data"][0]["metrics"] = ["exact_match", "chrf"]
    one, two = ({**recipe, "output": str(tmp_path / name)} for name in ("one", "two"))
    assert run(one, tmp_path / "one.log") == [0], (tmp_path / "one.log.0").read_text()[-3000:]
    assert sharded(two, tmp_path / "two.log") == [0, 0], (tmp_path / "two.log.0").read_text()[-3000:]
    expected, found = (read_record(tmp_path / name)["stages"][-1]["scores"] for name in ("one", "two"))
    assert [score["step"] for score in expected] == [2, 2, 4, 4]
    assert found == expected


# ---- 4-bit ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_bit_weights_are_stored_in_the_dtype_of_the_rest(dtype: torch.dtype) -> None:
    config = load_config("4bit", dtype)
    assert config is not None
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == dtype


def test_four_bit_weights_stored_as_integers_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    check_storage(torch.nn.Sequential(Linear4bit(64, 64, quant_storage=torch.bfloat16)).to("cpu"), torch.bfloat16)
    layer = torch.nn.Sequential(Linear4bit(64, 64)).to("cpu")
    with pytest.raises(RecipeError, match=r'0.weight is 4-bit in torch.uint8.*bnb_4bit_quant_storage="bfloat16"'):
        check_storage(layer, torch.bfloat16)
