"""Every host: attach without an argument, an identity at first, two branches, exact save, merge, unload."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_crome import CromeLayer
from tests.hosts import HOSTS, WIDTH
from tests.tuner.helpers import (
    FILE_KEYS,
    KEYS,
    M,
    adapted,
    assert_equal,
    attach,
    crome_weight,
    file_keys,
    frozen_logits,
    logits,
    randomise,
    to_dtype,
    trainable,
)

each_host = pytest.mark.parametrize("name", HOSTS)


@each_host
def test_sites_are_the_two_branches(name: str) -> None:
    host = HOSTS[name]()
    model = attach(host.model).get_base_model()
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, CromeLayer):
            found.setdefault(module.branch, []).append(path)
    assert found == host.sites


@each_host
def test_parameters_are_5_d_m(name: str) -> None:
    model = attach(HOSTS[name]().model)
    assert model.get_nb_trainable_parameters()[0] == 5 * WIDTH * M
    assert trainable(model) == [f"base_model.model.crome.{key}.default.weight" for key in sorted(KEYS, key=_order)]


def _order(key: str) -> int:
    return ["crome_up", "crome_gate_text", "crome_down_text", "crome_gate_vision", "crome_down_vision"].index(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_host
def test_fresh_adapter_leaves_logits_bit_equal(name: str, dtype: torch.dtype) -> None:
    host = HOSTS[name]()
    model = host.model.to(dtype).requires_grad_(False)
    batch = to_dtype(host.batch, dtype)
    expected = logits(model, batch)
    assert torch.isfinite(expected).all()
    assert_equal(logits(attach(model), batch), expected)


@each_host
def test_vision_branch_reads_images_alone(name: str) -> None:
    host = HOSTS[name]()
    with_image, without = frozen_logits(host), logits(host.model, host.text_only)
    model = adapted(host)
    with torch.no_grad():
        crome_weight(model, "down_text").zero_()  # the text branch is an identity again
    assert not torch.allclose(logits(model, host.batch), with_image, atol=1e-4)
    assert_equal(logits(model, host.text_only), without)


@each_host
def test_branches_both_reach_the_logits(name: str) -> None:
    host = HOSTS[name]()
    for silenced in ("text", "vision"):
        expected = logits(host.model, host.batch)
        model = adapted(host)
        with torch.no_grad():
            crome_weight(model, f"down_{silenced}").zero_()
        assert not torch.allclose(logits(model, host.batch), expected, atol=1e-4), f"with {silenced} silenced"
        host.model = model.unload()


@each_host
def test_gradients_reach_the_adapter_alone(name: str) -> None:
    host = HOSTS[name]()
    model = attach(host.model)
    randomise(model)
    model(**host.batch).loss.backward()
    for path, parameter in model.named_parameters():
        if "crome_" in path:
            assert parameter.grad is not None, path
            assert torch.isfinite(parameter.grad).all(), path
            assert parameter.grad.any(), path
        else:
            assert parameter.grad is None, path


@each_host
def test_save_then_load_gives_equal_logits(name: str, tmp_path: Path) -> None:
    host = HOSTS[name]()
    model = adapted(host)
    expected = logits(model, host.batch)
    model.save_pretrained(tmp_path)
    assert file_keys(tmp_path) == FILE_KEYS
    loaded = PeftModel.from_pretrained(HOSTS[name]().model, tmp_path)
    assert_equal(logits(loaded, host.batch), expected)


@each_host
def test_generate_is_equal_with_and_without_cache(name: str) -> None:
    host = HOSTS[name]()
    inputs = host.generate_inputs()
    base = host.model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                               output_logits=True).logits[0]  # fmt: skip
    model = adapted(host)
    runs = [
        model.generate(
            **inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache, return_dict_in_generate=True,
            output_logits=True,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for cached, full in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, runs[0].logits[0], atol=1e-4)


@each_host
def test_disable_adapter_is_bit_equal_to_the_base(name: str) -> None:
    host = HOSTS[name]()
    expected = frozen_logits(host)
    model = adapted(host)
    with model.disable_adapter():
        assert_equal(logits(model, host.batch), expected)
    assert not torch.equal(logits(model, host.batch), expected)


@each_host
def test_merge_keeps_logits_and_unmerge_restores(name: str) -> None:
    host = HOSTS[name]()
    model = adapted(host)
    layer = host.model.get_submodule(host.sites["text"][0])
    table = layer.weight.detach().clone()
    vocabulary = torch.arange(len(table))
    with torch.no_grad():
        adapted_rows = layer(vocabulary)
    expected = logits(model, host.batch)

    model.merge_adapter()

    assert not torch.equal(layer.weight, table)
    if not host.scaled_table:
        assert_equal(layer.weight.detach(), adapted_rows)
    # Not bit-equal: a product of 64 rows may round unlike one of 7.
    torch.testing.assert_close(logits(model, host.batch), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert_equal(layer.weight.detach(), table)
    assert_equal(logits(model, host.batch), expected)


@each_host
def test_merge_and_unload_keeps_logits(name: str) -> None:
    host = HOSTS[name]()
    model = adapted(host)
    expected = logits(model, host.batch)
    tied = getattr(host.model.config, "tie_word_embeddings", False)
    with pytest.warns(UserWarning, match="no longer tied") if tied else nullcontext():
        merged = model.merge_and_unload()
    assert not getattr(merged.config.get_text_config(), "tie_word_embeddings", False)
    torch.testing.assert_close(logits(merged, host.batch), expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, CromeLayer) for module in merged.modules())


@each_host
def test_unload_gives_the_base_back(name: str) -> None:
    host = HOSTS[name]()
    expected, keys = frozen_logits(host), list(host.model.state_dict())
    base = adapted(host).unload()
    assert_equal(logits(base, host.batch), expected)
    assert list(base.state_dict()) == keys
    assert not [path for path, _ in base.named_modules() if "crome" in path]
