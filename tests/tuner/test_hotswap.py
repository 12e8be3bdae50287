"""Test that hot-swap replaces the weights of one adapter by another's in place, or changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_crome import CromeConfig
from peft_crome.tuner.hotswap import hotswap_adapter
from tests.tuner.helpers import BOTH, adapted, assert_equal, assert_message, attach, logits, randomize, unchanged
from tests.zoo.llava import llava


def save_adapter(folder: Path, **config: Any) -> torch.Tensor:
    """Save an adapter other than the tests' usual one and return its logits."""
    host = llava()
    torch.manual_seed(7)
    model = attach(host.model, **config)
    randomize(model, seed=7)
    model.eval().save_pretrained(folder)
    return logits(model, host.batch)


def test_hotswap_gives_the_other_adapter_s_logits_in_the_same_tensors(tmp_path: Path) -> None:
    host = llava()
    model = adapted(host)
    before, pointers = logits(model, host.batch), {name: p.data_ptr() for name, p in model.named_parameters()}
    expected = save_adapter(tmp_path)
    hotswap_adapter(model, tmp_path)
    assert not torch.equal(expected, before)
    assert_equal(logits(model, host.batch), expected)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


def test_hotswap_does_not_compile_anew(tmp_path: Path) -> None:
    host = llava()
    model = adapted(host)
    compiled = torch.compile(model, backend="aot_eager")
    before = logits(compiled, host.batch)
    expected = save_adapter(tmp_path)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(logits(compiled, host.batch), before)
        hotswap_adapter(compiled, tmp_path)
        torch.testing.assert_close(logits(compiled, host.batch), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_hotswap_carries_modules_to_save(tmp_path: Path) -> None:
    host = llava()
    names = ["multi_modal_projector"]
    model = attach(host.model, modules_to_save=names).eval()
    other = attach(llava().model, modules_to_save=names).eval()
    randomize(other)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path)
    assert_equal(logits(model, host.batch), logits(other, host.batch))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"gate_activation": "sigmoid"}, "gate_activation='sigmoid'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"branches": {"text": ["embed_tokens"]}}, "PeftModel.from_pretrained"),
    ],
)
def test_hotswap_refuses_what_differs_in_more_than_weights(config: dict[str, Any], part: str, tmp_path: Path) -> None:
    model = adapted(llava())
    save_adapter(tmp_path, **config)
    with unchanged(model, tmp_path), pytest.raises(ValueError) as error:  # noqa: PT011  # checked by assert_message
        hotswap_adapter(model, tmp_path)
    assert_message(error.value, part)


def test_hotswap_refuses_another_bottleneck(tmp_path: Path) -> None:
    model = adapted(llava())
    get_peft_model(llava().model, CromeConfig(branches=BOTH, bottleneck_dim=8)).save_pretrained(tmp_path)
    with unchanged(model, tmp_path), pytest.raises(ValueError, match="bottleneck_dim=8, the adapter to replace has 4"):
        hotswap_adapter(model, tmp_path)


def test_hotswap_refuses_a_merged_adapter(tmp_path: Path) -> None:
    model = adapted(llava())
    save_adapter(tmp_path)
    model.merge_adapter()
    with unchanged(model, tmp_path), pytest.raises(ValueError, match=r"is merged. Call model.unmerge_adapter\(\)"):
        hotswap_adapter(model, tmp_path)


def test_hotswap_refuses_an_unknown_name_and_another_method(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    model = adapted(llava())
    with unchanged(model), pytest.raises(ValueError, match=r"No CROME adapter 'nobody'.*model.load_adapter"):
        hotswap_adapter(model, tmp_path, "nobody")
    lora = get_peft_model(llava().model, LoraConfig(target_modules=["q_proj"]))
    with unchanged(lora), pytest.raises(ValueError, match="No CROME adapter 'default'"):
        hotswap_adapter(lora, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ({"trainable_token_indices": [5]}, {"trainable_token_indices": [7]}, r"trained the tokens \[\[7\]\]"),
        ({}, {"branches": {"text": ["embed_tokens"], "vision": ["language_model.norm"]}}, "language_model.norm"),
    ],
    ids=["tokens", "branches"],
)
def test_hotswap_refuses_the_same_shapes_elsewhere(
    old: dict[str, Any], new: dict[str, Any], part: str, tmp_path: Path
) -> None:
    """Tensors of equal shapes are refused if they belong to other rows of the table or to another module."""
    model = adapted(llava(), **old)
    adapted(llava(), **new).save_pretrained(tmp_path, save_embedding_layers=False)
    with unchanged(model, tmp_path), pytest.raises(ValueError, match=part):
        hotswap_adapter(model, tmp_path)


def test_hotswap_takes_an_adapter_whose_branches_are_named(tmp_path: Path) -> None:
    """An adapter whose sites are named can replace one whose sites were looked up, because the sites are the same."""
    model = adapted(llava())
    named = {"text": ["embed_tokens"], "vision": ["multi_modal_projector"]}
    other = adapted(llava(), branches=named, trainable_token_indices=None)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path)
    assert_equal(logits(model, llava().batch), logits(other, llava().batch))


def test_hotswap_carries_trained_tokens(tmp_path: Path) -> None:
    model, other = (adapted(llava(), trainable_token_indices=[5, 9]) for _ in range(2))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    assert not torch.equal(logits(model, llava().batch), logits(other, llava().batch))
    hotswap_adapter(model, tmp_path)
    assert_equal(logits(model, llava().batch), logits(other, llava().batch))
