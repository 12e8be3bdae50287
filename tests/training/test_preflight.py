"""Test the checks before the first step: their report, what stops a run, and that they change nothing."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_crome.data import ConversationCollator, RowError, load_rows
from peft_crome.training import NotPredictable, Preflight, Recipe, RecipeError, build, load_recipe, train
from peft_crome.training.loop.dataset import load_sets, training_rows
from peft_crome.training.loop.trainer import CromeTrainer, training_arguments
from peft_crome.training.planning.devices import Device
from peft_crome.training.planning.preflight import check_gradients, preflight, sample_rows


@pytest.fixture(autouse=True)
def _every_dtype_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every dtype the same speed, so that tests do not depend on this machine's instructions for bfloat16."""
    monkeypatch.setattr("peft_crome.training.planning.devices.matmul_rate", lambda device, dtype: 1e10)


def prepared(recipe: Recipe) -> tuple[CromeTrainer, Recipe, Any, ConversationCollator, int]:
    """Return what `train` passes to `preflight`."""
    model, processor, _ = build(recipe)
    collator = ConversationCollator(processor, max_length=recipe.training.max_length)
    sets = load_sets(recipe)
    rows = training_rows(recipe, sets, collator.needs_split)
    arguments = training_arguments(recipe, "checkpoints")
    trainer = CromeTrainer(
        model=model, args=arguments, settings=recipe.training, train_dataset=rows, data_collator=collator
    )
    return trainer, recipe, rows, collator, len(rows)


def test_train_is_told_before_the_first_step(values: dict[str, Any]) -> None:
    """A report before the first step has the parts of the record and this recipe's rows, size and memory. No output
    exists yet."""
    reports: list[Preflight] = []

    def on_ready(report: Preflight) -> None:
        assert not Path(values["output"]).exists()
        reports.append(report)

    values["training"]["rows_per_device"] = 2
    record = train(load_recipe(values), on_ready)
    (report,) = reports
    assert report.trained == record["stages"][-1]["trained"]
    assert report.rows == len(report.sample.lengths) == 11  # of twelve, one is text alone
    assert (report.size.rows, report.size.images) == (2, 2)
    assert report.size.tokens == max(report.sample.lengths)
    assert report.cost is not None
    assert report.seconds is not None
    assert 0 < report.seconds[0] < report.seconds[1]
    assert report.cost.peak < report.device.memory
    assert not report.warnings


def test_nothing_is_changed_by_looking(values: dict[str, Any]) -> None:
    given = prepared(load_recipe(values))
    model = given[0].model.train()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    preflight(*given)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_share_of_rows_that_are_cut_is_counted(values: dict[str, Any], tmp_path: Path) -> None:
    collator = prepared(load_recipe(values))[3]
    rows = []
    for number, words in enumerate((2, 2, 30, 2)):
        said = " ".join(f"w{i}" for i in range(words))
        turns = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": said}]
        rows.append({"id": number, "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    collator.max_length = 12
    sample = sample_rows(load_rows(tmp_path / "rows.json"), collator)
    assert (sample.cut, len(sample.lengths), sample.longest, sample.media) == (1, 4, 12, 0)
    assert max(sample.lengths) > 30
    streamed = sample_rows(load_rows(tmp_path / "rows.json", streaming=True), collator)
    assert streamed.lengths == sample.lengths
    collator.max_length = 2
    with pytest.raises(RowError, match="hold no whole image and answer"):
        sample_rows(load_rows(tmp_path / "rows.json"), collator)


def test_row_with_an_image_is_preferred(values: dict[str, Any], dataset: Path) -> None:
    collator = prepared(load_recipe(values))[3]
    assert sample_rows(load_rows(dataset).select([11, 3]), collator).examples[0]["id"] == "3"


def test_stage_in_which_nothing_trains_is_refused(values: dict[str, Any]) -> None:
    given = prepared(load_recipe(values))
    given[0].model.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing of this model trains in 'pretrain'"):
        preflight(*given)


def test_weight_without_a_gradient_is_refused(values: dict[str, Any]) -> None:
    given = prepared(load_recipe(values))
    projection = given[0].model.get_base_model().image_projection.modules_to_save["default"]
    projection.unused = nn.Parameter(torch.ones(2))
    with pytest.raises(RecipeError, match=r"1 weights are to train and get no gradient .*image_projection.*unused"):
        preflight(*given)
    assert all(parameter.grad is None for parameter in given[0].model.parameters())


@pytest.mark.parametrize("branch", ["vision", "text"])
def test_adapter_that_is_not_reached_is_refused(branch: str, values: dict[str, Any]) -> None:
    trainer, _, rows, collator, _ = prepared(load_recipe(values))
    base = trainer.model.get_base_model()
    site = next(name for name, module in base.named_modules() if branch in getattr(module, "branches", {}))
    base.set_submodule(site, base.get_submodule(site).base_layer)
    with pytest.raises(RecipeError, match=branch):
        check_gradients(trainer.model, collator(sample_rows(rows, collator).examples))


def test_more_memory_than_there_is_names_the_keys_to_change(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = Device("a small GPU", 10_000, {}, (1.0, 1.0))
    monkeypatch.setattr("peft_crome.training.planning.preflight.this_device", lambda device, dtype: small)
    with caplog.at_level(logging.WARNING):
        report = preflight(*prepared(load_recipe(values)))
    assert report.seconds is None
    (warning,) = report.warnings
    assert warning in caplog.text
    assert "and a small GPU has 0.0 GB for it" in warning
    for key in ("rows_per_device: 2", "gradient_checkpointing: true", "backbones.quantization: 4bit"):
        assert key in warning


def test_a_cpu_without_instructions_for_a_dtype_is_pointed_out(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 1e10, torch.bfloat16: 2.5e9}
    monkeypatch.setattr("peft_crome.training.planning.devices.matmul_rate", lambda device, dtype: rates[dtype])
    values["backbones"]["dtype"] = "bfloat16"
    (warning,) = preflight(*prepared(load_recipe(values))).warnings
    assert "backbones.dtype: this machine's CPU multiplies 4 times as fast in float32 as in bfloat16" in warning
    values["backbones"]["dtype"] = "float32"
    assert preflight(*prepared(load_recipe(values))).warnings == []


def test_data_without_images_are_pointed_out(values: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    rows = [row for row in json.loads(dataset.read_text()) if "image" not in row]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    values["data"] = [{"path": str(tmp_path / "text.json")}]
    report = preflight(*prepared(load_recipe(values)))
    assert "no row of the sample has an image, so image_projection" in report.warnings[0]


def test_forward_pass_that_cannot_be_rehearsed_is_said(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotPredictable("It looks at values.")

    monkeypatch.setattr("peft_crome.training.planning.preflight.predict_step", fail)
    report = preflight(*prepared(load_recipe(values)))
    assert report.cost is None
    assert report.warnings == ["Memory and time are not predicted. It looks at values."]
