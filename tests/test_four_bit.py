"""Test that 4-bit layers pass gradients after an evaluation and work with any sizes, on any CPU.

bitsandbytes repacks weights only on CPUs with AVX-512 BF16. On other CPUs these tests pass without our fix.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from peft_crome import CromeVLMForConditionalGeneration
from peft_crome.backbone.four_bit import REPACKS, fix_repacking
from tests.tuner.helpers import KEYS, attach, crome_weight, logits, randomize
from tests.tuner.test_quantized import QUANTIZATION, quantized, wide_llava
from tests.zoo.llava import llava

bnb = pytest.importorskip("bitsandbytes")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**wide_llava().batch).loss.backward()
    return {key: crome_weight(model, key.removeprefix("crome_")).grad.clone() for key in KEYS}


def test_gradients_pass_after_an_evaluation(tmp_path: Path) -> None:
    wide_llava().model.save_pretrained(tmp_path)
    model = attach(quantized(tmp_path, "nf4"))
    randomize(model)
    before = gradients(model)
    logits(model.eval(), wide_llava().batch)
    after = gradients(model)
    for key, gradient in before.items():
        assert gradient.abs().max() > 0
        # The packed order rounds the scales of the weights to bfloat16.
        assert torch.cosine_similarity(after[key].flatten(), gradient.flatten(), dim=0) > 0.99, key


def test_gradients_pass_where_the_base_was_evaluated_before(tmp_path: Path) -> None:
    wide_llava().model.save_pretrained(tmp_path)
    base = quantized(tmp_path, "nf4")
    logits(base, wide_llava().batch)
    model = attach(base)
    randomize(model)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model).values())


def test_host_of_sizes_that_do_not_fit(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 80}
    case = llava(vision=sizes, hidden_size=64, intermediate_size=112)
    case.model.save_pretrained(tmp_path)
    base = tf.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=QUANTIZATION["nf4"], dtype=torch.float32, device_map="cpu"
    )
    model = attach(base)
    assert torch.isfinite(logits(model.eval(), case.batch)).all()


def test_projection_of_a_composite_trains_after_an_evaluation(tmp_path: Path) -> None:
    """The projection of a composite trains after an evaluation, without PEFT. bitsandbytes cannot repack the sizes of
    this tower and language model."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    tower = tf.CLIPVisionConfig(hidden_size=48, intermediate_size=80, image_size=28, patch_size=14, **sizes)
    tf.CLIPVisionModel(tower).save_pretrained(tmp_path / "tower")
    llama = tf.LlamaConfig(hidden_size=64, intermediate_size=112, vocab_size=40, **sizes)
    tf.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    four = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = CromeVLMForConditionalGeneration.from_backbones(
        str(tmp_path / "tower"),
        str(tmp_path / "llama"),
        quantization_config=four,
        vision_quantization_config=four,
        image_token_id=39,
        image_size=28,
    )
    batch = {"input_ids": torch.tensor([[39] * 4 + [1, 2, 3]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    for _ in range(2):
        with torch.no_grad():
            assert torch.isfinite(model.eval()(**batch).logits).all()
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert model.image_projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("in_features", "out_features", "fits"), [(64, 32, True), (64, 48, False), (96, 32, False)])
def test_only_sizes_that_fit_are_repacked(in_features: int, out_features: int, fits: bool) -> None:
    layer = bnb.nn.Linear4bit(in_features, out_features).to("cpu")
    setattr(layer, REPACKS, True)  # as on a CPU that repacks
    fix_repacking(layer)
    assert getattr(layer, REPACKS) is fits
