"""Test that weights divided between two processes by DeepSpeed train, save and resume as whole weights do.

`make test-deepspeed` installs DeepSpeed for these tests alone. Without it they are skipped.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from peft_crome import CromeConfig, logits_at_labels
from peft_crome.training import read_record
from tests.training.processes import KILLED, batches, run, spread
from tests.training.test_resume import state
from tests.zoo.case import Batch, Case
from tests.zoo.llava import llava

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# What examples/accelerate/zero3.yaml says, as `accelerate launch` hands it on.
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}


@pytest.fixture
def recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with eight rows a step and a norm to which each gradient is clipped."""
    values["training"] |= {"batch_size": 8, "rows_per_device": 2, "max_steps": 4, "learning_rate": 3e-3}
    values["training"] |= {"max_grad_norm": 0.01}
    return values


@pytest.mark.parametrize(("stage", "precision"), [("2", "no"), ("3", "no"), ("3", "bf16")])
def test_divided_weights_learn_and_answer_as_whole_ones(
    stage: str, precision: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    if precision == "bf16":
        for key in ("qformer", "qformer_tokenizer", "num_query_tokens"):
            del recipe["backbones"][key]
        recipe["backbones"]["dtype"] = "bfloat16"
        recipe["training"]["gradient_checkpointing"] = True
    metrics = ["exact_match", "chrf"]
    asked = [{"path": recipe["data"][0]["path"], "metrics": metrics}]
    recipe["evaluation"] = {"data": asked, "steps": 2, "max_rows": 3, "max_new_tokens": 2}
    one, two = ({**recipe, "output": str(tmp_path / name)} for name in ("one", "two"))
    assert run(one, tmp_path / "one.log") == [0], (tmp_path / "one.log.0").read_text()[-3000:]
    zero = ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage, "ACCELERATE_MIXED_PRECISION": precision}
    codes = run(two, tmp_path / "two.log", processes=2, sharded=zero)
    printed = (tmp_path / "two.log.0").read_text()
    assert codes == [0, 0], printed[-3000:]
    assert "computes the logits of all tokens" not in printed
    expected, found = (read_record(tmp_path / name)["stages"][-1] for name in ("one", "two"))
    assert found["trained"] == expected["trained"]
    assert found["scores"] == expected["scores"]
    losses = [torch.tensor(record["losses"]) for record in (found, expected)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4 if precision == "no" else 1e-2)
    whole, gathered = state(tmp_path / "one"), state(tmp_path / "two")
    assert whole.keys() == gathered.keys()
    for key, value in whole.items():
        assert gathered[key].dtype == value.dtype
        torch.testing.assert_close(gathered[key], value, rtol=1e-2, atol=2e-4, msg=key)


def test_divided_run_goes_on_where_it_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"] |= {"save_steps": 2, "max_steps": 5}
    recipe["adapter"]["dropout"] = 0.1
    plain = {**recipe, "output": str(tmp_path / "plain")}
    assert run(plain, tmp_path / "plain.log", processes=2, sharded=ZERO3) == [0, 0]
    killed = tmp_path / "killed.log"
    assert run(recipe, killed, processes=2, sharded=ZERO3, kill_at=3)[0] == KILLED
    assert run(recipe, killed, processes=2, sharded=ZERO3) == [0, 0], (tmp_path / "killed.log.0").read_text()[-3000:]
    assert read_record(recipe["output"])["stages"][-1]["resumed"]
    assert batches(tmp_path / "plain.log") == batches(killed)
    expected, found = state(tmp_path / "plain"), state(Path(recipe["output"]))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_gradient_that_is_not_finite_leaves_the_weights(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A gradient that is not finite leaves the weights unchanged. accelerate lets DeepSpeed step in the backward pass,
    before the check, but DeepSpeed skips such a step itself."""
    assert 0 not in run(recipe, tmp_path / "log", processes=2, sharded=ZERO3, spoil_at=1)
    printed = (tmp_path / "log.0").read_text()
    assert "Changed weights: []" in printed
    assert "NotFiniteError: Step 2: the gradient is NaN or infinite" in printed
    assert not Path(recipe["output"]).exists()


# ---- a model that DeepSpeed partitions while it is loaded ----

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.05,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def adapted(folder: Path, beside: list[str]) -> PeftModel:
    model = LlavaForConditionalGeneration.from_pretrained(folder / "host")
    torch.manual_seed(1)
    return get_peft_model(model, CromeConfig(bottleneck_dim=4, modules_to_save=beside or None)).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def text_rows(case: Case) -> Batch:
    assert case.text_only is not None
    return {**case.text_only, "labels": case.text_only["input_ids"]}


def steps(case: Case, beside: list[str], rows: slice) -> list[Batch]:
    """Return two batches of rows with an image. When only the adapter trains, add a batch of text alone."""
    images = {key: value[rows] for key, value in case.batch.items()}
    return [images, images, *([] if beside else [text_rows(case)])]


def attach_and_train(folder: Path, beside: list[str], rank: int) -> None:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    case = llava()
    settings = HfDeepSpeedConfig(SETTINGS)  # while it lives, from_pretrained partitions
    model = adapted(folder, beside)
    assert model.get_input_embeddings().weight.numel() == 0
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings.config)
    losses = []
    for batch in steps(case, beside, slice(rank, rank + 1)):
        asked = logits_at_labels(engine, batch)
        assert "logits_to_keep" in asked
        loss = engine(**asked).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(trained(model)):
        if rank == 0:
            model.save_pretrained(folder / "adapter")
    deepspeed.comm.barrier()
    host = LlavaForConditionalGeneration.from_pretrained(folder / "host")
    model = PeftModel.from_pretrained(host, folder / "adapter", is_trainable=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained(model)), config=settings.config)
    engine.eval()
    with torch.no_grad():
        logits = engine(**case.batch).logits
    torch.save(
        {"losses": losses, "logits": logits, "trained_on": model.peft_config["default"].trained_on}, folder / f"{rank}"
    )
    if beside:
        engine.train()
        with pytest.raises(RuntimeError, match="Put such input into every batch"):
            engine(**text_rows(case))


@pytest.mark.parametrize("beside", [[], ["multi_modal_projector"]], ids=["alone", "beside the projector"])
def test_adapter_on_a_partitioned_model_learns_as_on_a_whole_one(beside: list[str], tmp_path: Path) -> None:
    case = llava()
    case.model.save_pretrained(tmp_path / "host")  # type: ignore[operator]
    model = adapted(tmp_path, beside)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for batch in steps(case, beside, slice(None)):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained(model), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected = get_peft_model_state_dict(model)
    with torch.no_grad():
        logits = model.eval()(**case.batch).logits

    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    codes = spread(partial(attach_and_train, tmp_path, beside), tmp_path / "log", 2, zero)
    assert codes == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    means = [(a + b) / 2 for a, b in zip(one["losses"], two["losses"], strict=True)]
    assert means == pytest.approx(losses, rel=1e-5)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4, msg=key)
    torch.testing.assert_close(two["logits"], logits, rtol=0, atol=1e-3)
    assert one["trained_on"] == model.peft_config["default"].trained_on
