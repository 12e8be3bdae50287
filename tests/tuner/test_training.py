"""Test training with the Trainer and its checkpoints, with gradient checkpointing, and with `torch.compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from tests.tuner.helpers import (
    FILE_KEYS,
    KEYS,
    assert_equal,
    attach,
    changed,
    crome_weight,
    file_keys,
    logits,
    randomize,
    snapshot,
)
from tests.zoo import ZOO
from tests.zoo.case import Batch
from tests.zoo.llava import llava

CROME = {f"base_model.model.crome.{key}.default.weight" for key in KEYS}


def gradients(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(4)
    model.train()(**batch).loss.backward()
    return {key: crome_weight(model, key.removeprefix("crome_")).grad.clone() for key in KEYS}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llava", "instructblip_t5"])
def test_gradient_checkpointing_gives_equal_gradients(name: str, use_reentrant: bool, device: str) -> None:
    host = ZOO[name]().to(device)
    model = attach(host.model)
    randomize(model)
    expected = gradients(model, host.batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for key, gradient in gradients(model, host.batch).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at it
def test_compiled_model_gives_equal_gradients() -> None:
    host = llava()
    model = attach(host.model)
    randomize(model)
    expected = gradients(model, host.batch)
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    compiled(**host.batch).loss.backward()
    for key in KEYS:
        torch.testing.assert_close(crome_weight(model, key.removeprefix("crome_")).grad, expected[key], msg=key)


def rows(batch: Batch) -> list[dict[str, torch.Tensor]]:
    return [{key: value[i] for key, value in batch.items()} for i in range(2)] * 4


def make_trainer(model: nn.Module, batch: Batch, folder: Path, **arguments: Any) -> tf.Trainer:
    options = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": "none", "use_cpu": True,
        "save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(folder), **options | arguments),
        train_dataset=rows(batch),
    )


def test_trainer_changes_the_adapter_alone(tmp_path: Path) -> None:
    host = llava()
    model = attach(host.model)
    randomize(model)
    before = snapshot(model)
    make_trainer(model, host.batch, tmp_path, save_strategy="no").train()
    assert changed(model, before) == CROME


def test_trainer_checkpoint_is_an_adapter_that_loads(tmp_path: Path) -> None:
    host = llava()
    model = attach(host.model)
    make_trainer(model, host.batch, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert file_keys(checkpoint) == FILE_KEYS
    loaded = PeftModel.from_pretrained(llava().model, checkpoint)
    assert_equal(logits(loaded, host.batch), logits(model.eval(), host.batch))


def test_trainer_resumes_where_it_stopped(tmp_path: Path) -> None:
    host = llava()
    torch.manual_seed(5)
    through = attach(host.model)
    start = snapshot(through)
    make_trainer(through, host.batch, tmp_path / "a", max_steps=4, save_strategy="no").train()

    first = attach(llava().model)
    first.load_state_dict(start)
    stopper = make_trainer(first, host.batch, tmp_path / "b", max_steps=4, save_steps=2)
    stopper.add_callback(StopAt(2))
    stopper.train()
    resumed = attach(llava().model)
    make_trainer(resumed, host.batch, tmp_path / "b", max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
    )
    for key in KEYS:
        name = key.removeprefix("crome_")
        assert_equal(crome_weight(resumed, name).detach(), crome_weight(through, name).detach())


class StopAt(tf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
