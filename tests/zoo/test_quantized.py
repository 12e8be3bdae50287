"""Test quantized backbones of different families. A fresh adapter is an identity, trains, and gives equal logits
after reloading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

from tests.tuner.helpers import assert_equal, attach, logits, randomize
from tests.zoo import ZOO, Case

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

FAMILIES = (
    "llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "internvl", "idefics3", "smolvlm", "mistral3",
    "instructblip", "instructblip_t5", "glm4v", "florence2", "deepseek_vl",
)  # fmt: skip
# Towers stay as they are: their tiny layers do not fill bitsandbytes' blocks.
KEPT = ["lm_head", "vision_tower", "vision_model", "visual", "audio_tower", "qformer", "connector"]
QUANTIZATION = {
    "nf4": tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=KEPT,
    ),
    "int8": tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT),
}  # fmt: skip
LAYER = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}


def quantized(case: Case, folder: Path, kind: str) -> nn.Module:
    model = type(case.model).from_pretrained(
        folder, quantization_config=QUANTIZATION[kind], dtype=torch.float32, device_map="cpu"
    )
    assert sum(isinstance(module, LAYER[kind]) for module in model.modules()) >= 8, "hardly anything is quantized"
    # In eval mode, some CPUs pack 4-bit weights for a kernel that takes whole blocks only; nothing here has dropout.
    return model.train(kind == "nf4")


def quantized_check(name: str, kind: str, folder: Path) -> None:
    case = ZOO[name]()
    case.model.save_pretrained(folder / "base")
    base = quantized(case, folder / "base", kind).requires_grad_(False)
    expected = logits(base, case.batch)
    assert_equal(logits(attach(base, branches=[*case.sites]), case.batch), expected)

    model = attach(quantized(case, folder / "base", kind), branches=[*case.sites])
    randomize(model)
    model(**case.batch).loss.backward()
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("crome_" in path), path
        assert parameter.grad is None or (torch.isfinite(parameter.grad).all() and parameter.grad.any()), path
    adapted = logits(model, case.batch)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(quantized(case, folder / "base", kind), folder / "adapter")
    assert_equal(logits(loaded.train(kind == "nf4"), case.batch), adapted)


@pytest.mark.parametrize("name", FAMILIES)
def test_nf4(name: str, tmp_path: Path) -> None:
    quantized_check(name, "nf4", tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_int8(name: str, tmp_path: Path) -> None:
    quantized_check(name, "int8", tmp_path)
