"""Test that a folded quantized model loads with the same logits, or is refused before a file is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from safetensors import safe_open
from transformers.quantizers import HfQuantizer

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from peft_crome.serving import fold
from peft_crome.training import save_stage
from tests.conformity.test_quantization_matrix import load, load_hqq, torchao_int4, torchao_int8
from tests.tuner.helpers import adapted
from tests.tuner.test_quantized import wide_llava
from tests.vlm.tiny import build
from tests.zoo import ZOO

TEXT = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])


def eight_bit() -> Any:
    return tf.BitsAndBytesConfig(load_in_8bit=True)


def four_bit() -> Any:
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


WAYS: dict[str, Callable[[], Any]] = {
    "bitsandbytes 8 bits": eight_bit,
    "bitsandbytes 4 bits": four_bit,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("quantized")
    wide_llava().model.save_pretrained(home / "llava")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for tied in (True, False):
        language = tf.LlamaConfig(hidden_size=64, vocab_size=100, pad_token_id=0, tie_word_embeddings=tied, **sizes)
        tf.LlamaForCausalLM(language).save_pretrained(home / f"language-{tied}")
    tf.CLIPVisionModel(tf.CLIPVisionConfig(hidden_size=32, image_size=28, patch_size=14, **sizes)).save_pretrained(
        home / "vision"
    )
    return home


def with_both_branches(model: Any, vision: str) -> Any:
    branches = {"text": ["embed_tokens"], "vision": [vision]}
    return get_peft_model(model, CromeConfig(bottleneck_dim=4, init_weights=False, branches=branches)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would pack 4-bit weights, and lose a little
    return model(input_ids=TEXT).logits


@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_host_loads_with_the_same_logits(way: str, folder: Path, tmp_path: Path) -> None:
    host = load(folder / "llava", torch.float32, WAYS[way])
    model = with_both_branches(host, "multi_modal_projector")
    expected = logits(model)
    fold(model, tmp_path / "folded")
    assert torch.equal(logits(model), expected)
    stock, found = type(host).from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not any(found.values()), found
    assert stock.hf_quantizer is not None
    torch.testing.assert_close(logits(stock.eval()), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_composite_with_a_quantized_language_model(way: str, tied: bool, folder: Path, tmp_path: Path) -> None:
    composite = CromeVLMForConditionalGeneration.from_backbones(
        str(folder / "vision"), str(folder / f"language-{tied}"), quantization_config=WAYS[way](), image_token_id=100
    )
    model = with_both_branches(composite, "vision_fusion")
    expected = logits(model)
    fold(model, tmp_path / "folded")
    assert torch.equal(logits(model), expected)
    stock, found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not any(found.values()), found
    torch.testing.assert_close(logits(stock.eval()), expected, rtol=1e-4, atol=1e-4)


def assert_refused(model: Any, output: Path, message: str) -> None:
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        fold(model, output)
    assert not list(output.parent.iterdir())
    assert torch.equal(logits(model), expected)


def test_layers_that_hqq_put_in_are_refused(folder: Path, tmp_path: Path) -> None:
    model = with_both_branches(load_hqq(folder / "llava"), "multi_modal_projector")
    assert_refused(model, tmp_path / "folded", r"(?s)LlavaForConditionalGeneration has no .*W_q.*without quantization")


def test_tensors_that_torchao_put_in_are_refused(folder: Path, tmp_path: Path) -> None:
    """Tensors that torchao's own function quantized are refused. transformers has no record of it: the keys stay the
    same, and only the values change."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    host = load(folder / "llava", torch.float32)
    quantize_(host.model.language_model, Int8WeightOnlyConfig())
    model = with_both_branches(host, "multi_modal_projector")
    assert_refused(model, tmp_path / "folded", r"LlavaForConditionalGeneration has no .*proj\.weight")


def test_a_quantization_that_cannot_be_written_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = load(folder / "llava", torch.float32, eight_bit)
    monkeypatch.setattr(type(host.hf_quantizer), "is_serializable", lambda self: False)
    model = with_both_branches(host, "multi_modal_projector")
    assert_refused(model, tmp_path / "folded", "which transformers cannot write. Load the model without quantization")


def test_a_module_of_a_user_s_own_in_the_host_is_refused(tmp_path: Path) -> None:
    model = adapted(ZOO["llava"]())
    model.get_base_model().extra = torch.nn.Linear(2, 2)
    assert_refused(model, tmp_path / "folded", r"has no \['extra.bias', 'extra.weight'\]")


class DropsTheStateDict(HfQuantizer):
    """Write the model's own state dict and ignore any other, as the quantizers of transformers do."""

    def __init__(self) -> None:
        self.quantization_config, self.pre_quantized = None, False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, *args: Any, **kwargs: Any) -> None: ...

    def _process_model_after_weight_loading(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize("name", ["new", "good"])
def test_a_composite_that_was_written_otherwise_than_meant_is_not_kept(
    name: str, folder: Path, tmp_path: Path
) -> None:
    composite = CromeVLMForConditionalGeneration.from_backbones(
        str(folder / "vision"), str(folder / "language-True"), image_token_id=100
    )
    composite.save_pretrained(tmp_path / "good", max_shard_size="2KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    assert len([file for file in before if file.endswith(".safetensors")]) > 1
    composite.hf_quantizer = DropsTheStateDict()
    with pytest.raises(ValueError, match=r"checkpoint differs from the model \(\d+ unexpected: \['language_model"):
        composite.save_pretrained(tmp_path / name)
    after = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert after == (before if name == "good" else {})


def test_a_key_that_is_left_out_is_seen(tmp_path: Path) -> None:
    composite = build()
    composite._keys_to_ignore_on_save = {"image_projection.bias"}
    with pytest.raises(ValueError, match=r"1 missing: \['image_projection.bias'\]"):
        composite.save_pretrained(tmp_path / "composite")
    assert not list((tmp_path / "composite").iterdir())
    case = ZOO["llava"]()
    case.model._keys_to_ignore_on_save = {"lm_head.weight"}
    with pytest.raises(ValueError, match=r"1 missing: \['(language_model.)?lm_head.weight'\]"):
        fold(adapted(case), tmp_path / "folded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["composite"]


class NoProcessor:
    def save_pretrained(self, directory: Path) -> None: ...


def test_a_stage_that_lacks_a_weight_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_crome.training.directory.stage as module

    def saved(name: str) -> None:
        model = get_peft_model(build(), CromeConfig(bottleneck_dim=4))
        save_stage(model, NoProcessor(), tmp_path / name, {"stages": []}, "# A stage\n")

    saved("whole")
    with safe_open(tmp_path / "whole" / "adapter_model.safetensors", framework="pt") as file:
        assert "base_model.model.crome.crome_up.weight" in file.keys()  # noqa: SIM118  # safe_open is no dictionary
    own = module.get_peft_model_state_dict
    monkeypatch.setattr(
        module, "get_peft_model_state_dict", lambda model: {k: v for k, v in own(model).items() if "crome_up" not in k}
    )
    with pytest.raises(ValueError, match=r"1 missing: \['base_model.model.crome.crome_up.weight'\]"):
        saved("partial")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
