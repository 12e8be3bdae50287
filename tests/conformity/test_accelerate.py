"""Test adapters on a frozen backbone whose weights accelerate moves in and out. The adapter acts, trains and loads as
it does without that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel
from torch import nn
from transformers import LlavaForConditionalGeneration

from tests.tuner.helpers import adapted, assert_equal, attach, crome_weight, logits, randomize, train_steps
from tests.zoo.llava import llava


def to_disk_by_map(model: nn.Module, folder: Path, device: str) -> nn.Module:
    """Dispatch a model as `device_map="auto"` does when memory is short. The tower and the layers go to disk, and the
    sites stay in memory."""
    device_map = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": device,
        "model.language_model.embed_tokens": device,
        "model.language_model.layers": "disk",
        "model.language_model.norm": device,
        "model.language_model.rotary_emb": device,
        "lm_head": device,
    }
    return dispatch_model(model, device_map, main_device=device, offload_dir=folder, force_hooks=True)


WAYS: dict[str, Callable[[Any, Path, str], Any]] = {
    "cpu_offload": lambda model, folder, device: cpu_offload(model, execution_device=torch.device(device)),
    "disk_offload": lambda model, folder, device: disk_offload(
        model, str(folder), execution_device=torch.device(device)
    ),
    "device map with a disk": to_disk_by_map,
}


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_backbone_gives_the_same_logits_and_gradients(way: str, device: str, tmp_path: Path) -> None:
    host = llava().to(device)
    plain = adapted(host)
    expected = logits(plain, host.batch)
    plain(**host.batch).loss.backward()
    gradient = crome_weight(plain, "gate_vision").grad
    plain.save_pretrained(tmp_path / "adapter")

    backbone = WAYS[way](llava().model, tmp_path / "weights", device)
    model = PeftModel.from_pretrained(backbone, tmp_path / "adapter", is_trainable=True).eval()
    assert_equal(logits(model, host.batch), expected)
    model(**host.batch).loss.backward()
    found = crome_weight(model, "gate_vision").grad
    assert gradient is not None
    assert found is not None
    assert_equal(found, gradient)
    generated = model.generate(**host.generate_inputs(), max_new_tokens=3, do_sample=False)
    assert_equal(generated, plain.generate(**host.generate_inputs(), max_new_tokens=3, do_sample=False))


def test_device_map_auto_trains_and_is_saved(tmp_path: Path) -> None:
    host = llava()
    host.model.save_pretrained(tmp_path / "host")

    def load() -> nn.Module:
        return LlavaForConditionalGeneration.from_pretrained(tmp_path / "host", device_map="auto")

    model = attach(load())
    randomize(model)
    losses = train_steps(model, host.batch)
    assert losses[-1] < losses[0]
    expected = logits(model.eval(), host.batch)
    model.save_pretrained(tmp_path / "adapter")
    assert_equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval(), host.batch), expected)
