"""Test training on a GPU: autocast, logits at labels, the optimizer, data loading and the memory of a step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_crome import CromeConfig, CromeLayer, logits_at_labels
from peft_crome.training import load_recipe, train
from peft_crome.tuner import CromeWeights
from tests.training.tiny import weights
from tests.tuner.helpers import KEYS, adapted, crome_weight
from tests.tuner.test_training import gradients
from tests.zoo.llava import llava


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast_are_near_those_without(dtype: torch.dtype, place: str) -> None:
    case = llava().to(place)
    model = adapted(case)
    expected = gradients(model, case.batch)
    model.forward = torch.autocast(place, dtype=dtype)(model.forward)  # as accelerate does
    scaler = torch.amp.GradScaler(place, enabled=dtype is torch.float16)
    trained = [crome_weight(model, key.removeprefix("crome_")) for key in KEYS]
    optimizer = torch.optim.AdamW(trained, fused=True)
    model.zero_grad()
    scaler.scale(model(**case.batch).loss).backward()
    scaler.unscale_(optimizer)
    for key, weight in zip(KEYS, trained, strict=True):
        assert weight.grad is not None, key
        assert weight.grad.dtype is torch.float32, key
        assert weight.grad.isfinite().all(), key
        assert torch.cosine_similarity(weight.grad.flatten(), expected[key].flatten(), dim=0) > 0.98, key
    before = [weight.clone() for weight in trained]
    scaler.step(optimizer)
    assert not any(torch.equal(weight, old) for weight, old in zip(trained, before, strict=True))


def test_logits_at_labels_give_the_same_loss_and_gradients(place: str) -> None:
    case = llava().to(place)
    model = adapted(case)
    batch = logits_at_labels(model, case.batch)
    assert batch["logits_to_keep"].device.type == place
    torch.testing.assert_close(model(**batch).loss, model(**case.batch).loss, rtol=1e-4, atol=1e-5)
    expected = gradients(model, case.batch)
    for key, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5, msg=key)


def run(values: dict[str, Any], output: Path, place: str, **arguments: Any) -> tuple[list[float], dict[str, Any]]:
    """Train a stage, and return its losses and weights."""
    values = copy.deepcopy(values) | {"output": str(output)}
    values["training"]["arguments"] |= {"use_cpu": place == "cpu", **arguments}
    record = train(load_recipe(values))["stages"][-1]
    return [loss for _, loss in record["losses"]], weights(output)


@pytest.mark.parametrize("half", [{}, {"bf16": True}, {"fp16": True}], ids=lambda half: "-".join(half) or "float32")
def test_fused_adamw_trains_as_the_other(
    half: dict[str, bool], place: str, values: dict[str, Any], tmp_path: Path
) -> None:
    losses, fused = run(values, tmp_path / "fused", place, optim="adamw_torch_fused", **half)
    others, plain = run(values, tmp_path / "plain", place, optim="adamw_torch", **half)
    assert losses == pytest.approx(others, rel=1e-2)
    assert losses[-1] < losses[0]
    for key, value in fused.items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, plain[key], rtol=1e-2, atol=1e-3, msg=key)


@pytest.mark.gpu
def test_pinned_batches_of_workers_are_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    options = {"dataloader_pin_memory": True, "dataloader_num_workers": 2}
    losses, pinned = run(values, tmp_path / "pinned", "cuda", **options)
    others, plain = run(values, tmp_path / "plain", "cuda", dataloader_pin_memory=False)
    assert losses == pytest.approx(others, rel=1e-5)
    for key, value in pinned.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_are_near_those_of_a_cpu(autocast: bool, values: dict[str, Any], tmp_path: Path) -> None:
    """Losses on a GPU are close to those on a CPU. This also needs the same pixels and the same order of rows."""
    losses, _ = run(values, tmp_path / "gpu", "cuda", bf16=autocast)
    others, _ = run(values, tmp_path / "cpu", "cpu")
    assert losses == pytest.approx(others, rel=2e-2 if autocast else 1e-3)


@pytest.mark.gpu
def test_memory_that_the_adapter_keeps() -> None:
    """For its backward pass, the adapter keeps only each token's embedding and its two products of m features, as CUDA
    counts memory."""
    width, m, tokens = 2048, 64, 4096
    store = CromeWeights()
    store.add("default", CromeConfig(bottleneck_dim=m, init_weights=False), ["vision"], width, 0.7)
    layer = CromeLayer(nn.Identity(), store, width)
    layer.branches_of = {"default": {"vision": []}}
    layer.set_adapter(["default"])
    layer.train().to("cuda")
    store.to("cuda")
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    layer(x).sum().backward()  # kernels' own work space is there then
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = layer(x)
    torch.cuda.synchronize()
    added = torch.cuda.memory_allocated() - before - output.numel() * output.element_size()
    of_x = x.numel() * x.element_size()
    assert added + of_x <= (2 * width + 8 * m) * tokens * 1.01
    assert added > 0
