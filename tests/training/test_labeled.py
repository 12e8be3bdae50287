"""Test that training with logits only at the labels learns what training with all logits does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from peft_crome import logits_at_labels
from peft_crome.data import ConversationCollator
from peft_crome.training import CromeTrainer, Preflight, StepSize, build, load_recipe, predict_step, recipe_skeleton
from peft_crome.training import train as train_recipe
from peft_crome.training.loop import trainer as module
from peft_crome.training.loop.dataset import load_sets, training_rows
from peft_crome.training.loop.trainer import training_arguments
from tests.training.tiny import weights

ACCUMULATED = {"rows_per_device": 2, "max_steps": 4}


def losses(values: dict[str, Any]) -> list[float]:
    record = json.loads((Path(values["output"]) / "crome_stage.json").read_text())["stages"][-1]
    return [loss for _, loss in record["losses"]]


@pytest.mark.parametrize("training", [{}, ACCUMULATED], ids=["one batch a step", "accumulated"])
def test_the_same_losses_and_weights(
    training: dict[str, Any], values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= training
    train_recipe(load_recipe(values))
    whole = {**values, "output": str(tmp_path / "all logits")}
    monkeypatch.setattr(module, "logits_at_labels", lambda model, batch: batch)
    train_recipe(load_recipe(whole))
    assert losses(values) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = weights(Path(values["output"])), weights(Path(whole["output"]))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-4)  # Adam divides small numbers by small ones


def trainer_of(values: dict[str, Any]) -> tuple[CromeTrainer, list[dict[str, Any]]]:
    recipe = load_recipe(values)
    model, processor, _ = build(recipe)
    sets = load_sets(recipe)
    collator = ConversationCollator(processor)
    rows = training_rows(recipe, sets, collator.needs_split)
    trainer = CromeTrainer(
        model=model, args=training_arguments(recipe, "checkpoints"), settings=recipe.training, train_dataset=rows,
        data_collator=collator,
    )  # fmt: skip
    return trainer, [rows[0], rows[1]]


def shapes_of_logits(trainer: CromeTrainer) -> list[torch.Size]:
    """Record the shape of the logits in each forward pass from now on."""
    shapes: list[torch.Size] = []

    def see(model: nn.Module, inputs: Any, output: Any) -> None:
        shapes.append(output.logits.shape)

    trainer.model.get_base_model().language_model.register_forward_hook(see)
    return shapes


def test_training_asks_for_fewer(values: dict[str, Any]) -> None:
    trainer, rows = trainer_of(values)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    expected = trainer.model(**batch).loss
    logits_at_labels(trainer.model, batch)  # the trial
    shapes = shapes_of_logits(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert shapes[0][:-1].numel() == labels < batch["labels"].numel()
    torch.testing.assert_close(loss, expected)


def test_evaluation_keeps_all_logits(values: dict[str, Any]) -> None:
    """Evaluation keeps all logits, because users of `Trainer` compare predictions with labels of the same shape."""
    trainer, rows = trainer_of(values)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    loss, outputs, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    assert logits.shape[:-1] == labels.shape
    torch.testing.assert_close(loss, trainer.model(**batch).loss.detach())


@pytest.mark.parametrize("way", ["label smoothing", "compute_loss_func"])
def test_a_loss_of_all_logits(way: str, values: dict[str, Any]) -> None:
    trainer, rows = trainer_of(values)
    if way == "compute_loss_func":
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.float().mean()
    else:
        trainer.label_smoother = LabelSmoother(0.1)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    shapes = shapes_of_logits(trainer)
    trainer.compute_loss(trainer.model, dict(batch))
    assert shapes == [torch.Size((*batch["labels"].shape, shapes[0][-1]))]


def test_memory_is_predicted_of_fewer_logits(values: dict[str, Any]) -> None:
    model = recipe_skeleton(load_recipe(values))
    whole, few = (predict_step(model, StepSize(4, 64, images=4, label_tokens=count)) for count in (None, 2))
    vocabulary = model.config.get_text_config().vocab_size
    assert whole.kept - few.kept >= 4 * 62 * vocabulary * 4  # the log-probabilities in float32
    assert whole.peak > few.peak
    assert whole.flops > few.flops


def test_preflight_counts_labels(values: dict[str, Any]) -> None:
    reports: list[Preflight] = []
    train_recipe(load_recipe(values), reports.append)
    (report,) = reports
    assert 0 < report.sample.label_tokens < report.size.tokens
    assert report.size.label_tokens == report.sample.label_tokens
