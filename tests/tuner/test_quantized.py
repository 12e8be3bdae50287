"""Test hosts whose language model and projector are quantized by bitsandbytes. They train, save and load with equal
logits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn

from peft_crome.backbone.model import read_host
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
    train_steps,
    trainable,
)
from tests.zoo.case import Case, moved
from tests.zoo.llava import llava

bnb = pytest.importorskip("bitsandbytes")

QUANTIZATION = {
    "nf4": tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head"],
    ),
    "int8": tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
}  # fmt: skip
LAYER = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
each_kind = pytest.mark.parametrize("kind", QUANTIZATION)


@cache
def wide_llava() -> Case:
    """Build a LLaVA that is 64 wide everywhere. The 4-bit kernel of bitsandbytes for CPUs takes whole blocks of 64
    inputs and 32 outputs."""
    return llava(vision={"hidden_size": 64, "intermediate_size": 64}, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    wide_llava().model.save_pretrained(folder)
    return folder


def quantized(checkpoint: Path, kind: str, device: str = "cpu") -> nn.Module:
    model = tf.LlavaForConditionalGeneration.from_pretrained(
        checkpoint, quantization_config=QUANTIZATION[kind], dtype=torch.float32, device_map={"": device}
    )
    assert isinstance(model.model.multi_modal_projector.linear_2, LAYER[kind])
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj, LAYER[kind])
    return model.eval()


@each_kind
def test_fresh_adapter_leaves_logits_bit_equal(kind: str, device: str, checkpoint: Path) -> None:
    model = quantized(checkpoint, kind, device).requires_grad_(False)
    batch = moved(wide_llava().batch, device)
    expected = logits(model, batch)
    assert_equal(logits(attach(model).eval(), batch), expected)


@each_kind
def test_training_changes_the_adapter_alone_and_reloads_equal(
    kind: str, device: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = attach(quantized(checkpoint, kind, device))
    assert {crome_weight(model, key.removeprefix("crome_")).dtype for key in KEYS} == {torch.float32}
    randomize(model)
    before = snapshot(model.train())  # in eval mode bitsandbytes repacks its own tensors for the CPU
    losses = train_steps(model, moved(wide_llava().batch, device), steps=3)
    assert losses[-1] < losses[0]
    assert changed(model, before) == {f"base_model.model.crome.{key}.default.weight" for key in KEYS}

    expected = logits(model.eval(), moved(wide_llava().batch, device))
    model.save_pretrained(tmp_path)
    assert file_keys(tmp_path) == FILE_KEYS
    loaded = PeftModel.from_pretrained(quantized(checkpoint, kind, device), tmp_path)
    assert_equal(logits(loaded, moved(wide_llava().batch, device)), expected)


@each_kind
def test_gradients_reach_every_adapter_parameter(kind: str, device: str, checkpoint: Path) -> None:
    model = attach(quantized(checkpoint, kind, device))
    randomize(model)
    model(**moved(wide_llava().batch, device)).loss.backward()
    for key in KEYS:
        gradient = crome_weight(model, key.removeprefix("crome_")).grad
        assert gradient is not None, key
        assert torch.isfinite(gradient).all(), key
        assert gradient.any(), key


@each_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prepare_for_kbit_training_makes_no_difference_to_what_trains(
    kind: str, checkpointing: bool, device: str, checkpoint: Path
) -> None:
    plain = attach(quantized(checkpoint, kind, device))
    prepared = attach(
        prepare_model_for_kbit_training(
            quantized(checkpoint, kind, device), checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    )
    assert trainable(prepared) == trainable(plain)
    assert {crome_weight(prepared, key.removeprefix("crome_")).dtype for key in KEYS} == {torch.float32}
    gradients = []
    for model in (plain, prepared):
        torch.manual_seed(1)
        for key in KEYS:
            parameter = crome_weight(model, key.removeprefix("crome_"))
            nn.init.normal_(parameter, std=0.1)
        model.train()(**moved(wide_llava().batch, device)).loss.backward()
        gradients.append([crome_weight(model, key.removeprefix("crome_")).grad for key in KEYS])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@each_kind
def test_unload_gives_the_quantized_backbone_back(kind: str, device: str, checkpoint: Path) -> None:
    model = quantized(checkpoint, kind, device).requires_grad_(False)
    batch = moved(wide_llava().batch, device)
    expected = logits(model, batch)
    adapted = attach(model)
    randomize(adapted)
    assert not torch.equal(logits(adapted.eval(), batch), expected)
    assert_equal(logits(adapted.unload(), batch), expected)


@each_kind
def test_merge_folds_the_text_branch_of_a_quantized_backbone(kind: str, device: str, checkpoint: Path) -> None:
    model = attach(quantized(checkpoint, kind, device), branches=["text"])
    randomize(model)
    batch = moved(wide_llava().batch, device)
    expected = logits(model.eval(), batch)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [bnb.nn.Embedding8bit, bnb.nn.Embedding4bit])
def test_scale_of_a_packed_embedding_table(packed: type[nn.Embedding], device: str) -> None:
    """The scale of a packed table is that of its embeddings, because its weight holds integers."""
    weight = 3 * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    table: nn.Embedding = nn.Embedding(2000, 64, _weight=weight)
    model = nn.Module()
    model.get_input_embeddings = lambda: table
    expected = read_host(model).rms
    table = packed(2000, 64)
    table.load_state_dict({"weight": weight})
    table = table.to(device)
    assert not table.weight.is_floating_point()
    assert read_host(model).rms == pytest.approx(expected, rel=0.02)
