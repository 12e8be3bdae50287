"""Test batches without an image. They train nothing and stop nothing, and their loss is the base model's."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.tuner.helpers import attach, randomize
from tests.zoo import ZOO
from tests.zoo.case import Batch, words
from tests.zoo.llava import llava


def sentence() -> Batch:
    batch = words()
    return {**batch, "labels": batch["input_ids"].clone()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_no_change_and_zero(model: nn.Module, loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=0)
    loss.backward()
    assert trained(model)
    for name, parameter in trained(model).items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [{}, {"modules_to_save": ["multi_modal_projector"]}, {"dropout": 0.5}],
    ids=["adapter", "adapter and projector", "dropout"],
)
def test_the_loss_is_the_base_model_s_and_gradients_are_zero(config: dict[str, Any], dtype: torch.dtype) -> None:
    host = llava().model.to(dtype).requires_grad_(False)
    expected = host(**sentence()).loss
    model = attach(host, branches=None, **config)
    randomize(model)
    assert_no_change_and_zero(model, model.train()(**sentence()).loss, expected)


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing(checkpointing: dict[str, bool]) -> None:
    host = llava().model.requires_grad_(False)
    expected = host(**sentence()).loss
    model = attach(host, branches=None)
    randomize(model)
    model.gradient_checkpointing_enable(checkpointing)
    model.enable_input_require_grads()
    assert_no_change_and_zero(model, model.train()(**sentence()).loss, expected)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph: bool) -> None:
    host = llava().model.requires_grad_(False)
    model = attach(host, branches=None).train()
    randomize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    compiled(**sentence()).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained(model).values())


def test_a_loss_of_one_s_own() -> None:
    """A loss computed from logits has gradients of zero too. Preference trainers compute their loss this way."""
    model = attach(llava().model, branches=None).train()
    (-model(**words()).logits.log_softmax(-1)[0, 0, 5]).backward()
    assert all(not parameter.grad.any() for parameter in trained(model).values())


def test_images_without_sound() -> None:
    """In a model with vision and audio, images without sound train the vision branch and give the audio weights
    gradients of zero."""
    case = ZOO["phi4_multimodal"]()
    model = attach(case.model, branches=None).train()
    branches = model.peft_config["default"].branches
    assert {"vision", "audio"} <= set(branches)
    randomize(model)
    silent = {key: value for key, value in case.batch.items() if "audio" not in key}
    assert any("pixel" in key for key in silent)
    model(**silent).logits.sum().backward()
    for name, parameter in trained(model).items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == ("audio" not in name), name


def test_evaluation_returns_plain_tensors() -> None:
    model = attach(llava().model, branches=None).eval()
    assert not model(**words()).logits.requires_grad


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_goes_on(accumulation: int, tmp_path: Path) -> None:
    """The plain `Trainer` runs through rows of text alone with rows of an image among them, and it ends with text."""
    case = llava()
    image = {key: value[0].tolist() for key, value in case.batch.items()}
    text = {key: value[0].tolist() for key, value in sentence().items()}
    rows = Dataset.from_list([{**text, "pixel_values": None}, image, {**text, "pixel_values": None}] * 2)

    def collate(batch: list[dict[str, Any]]) -> Batch:
        (row,) = batch
        return {key: torch.tensor([value]) for key, value in row.items() if value is not None}

    model = attach(case.model, branches=None)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6 // accumulation, per_device_train_batch_size=1, report_to="none",
        gradient_accumulation_steps=accumulation, learning_rate=0.1, use_cpu=True, remove_unused_columns=False,
        save_strategy="no", logging_steps=1, train_sampling_strategy="sequential", weight_decay=0.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 // accumulation
    if accumulation == 1:
        assert losses[0] == losses[2] == losses[3] == losses[5]  # text: the base model's, whatever has been learned
        assert losses[4] < losses[1]


def _two_processes(rank: int, folder: str) -> None:
    # By a file: a store in one process would end with it, while the other may still ask.
    where = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=120)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **where)
    case = llava()
    model = attach(case.model, branches=None, modules_to_save=["multi_modal_projector"])
    randomize(model)
    parallel = nn.parallel.DistributedDataParallel(model.train())  # every parameter is waited for
    for batch in (case.batch if rank == 0 else sentence(), sentence()):
        parallel(**batch).loss.backward()
    torch.save({name: parameter.grad for name, parameter in trained(model).items()}, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """One process has an image and the other has text, and then both have text. The gradient is half of the
    image's."""
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    case = llava()
    model = attach(case.model, branches=None, modules_to_save=["multi_modal_projector"])
    randomize(model)
    model.train()(**case.batch).loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        for name, parameter in trained(model).items():
            torch.testing.assert_close(found[name], parameter.grad / 2, rtol=1e-4, atol=1e-7)
