"""modules_to_save beside an adapter, also where it names a module that is itself a site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_crome import CromeConfig
from tests.tuner.helpers import (
    KEYS,
    assert_equal,
    attach,
    changed,
    frozen_logits,
    logits,
    randomise,
    snapshot,
    train_steps,
    trainable,
)
from tests.zoo.llava import llava

PROJECTOR = "model.multi_modal_projector"


def test_modules_to_save_trains_a_module_that_is_a_site() -> None:
    host = llava()
    model = attach(host.model, modules_to_save=["multi_modal_projector"])
    randomise(model)
    before = snapshot(model)
    losses = train_steps(model, host.batch)
    assert losses[-1] < losses[0]
    parts = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
    copies = f"base_model.model.{PROJECTOR}.base_layer.modules_to_save.default."
    assert changed(model, before) == {copies + part for part in parts} | {
        f"base_model.model.crome.{key}.default.weight" for key in KEYS
    }
    for name, tensor in llava().model.get_submodule(PROJECTOR).state_dict().items():
        kept = model.get_parameter(f"base_model.model.{PROJECTOR}.base_layer.original_module.{name}")
        assert_equal(kept.detach(), tensor)


@pytest.mark.parametrize(
    "names", [["multi_modal_projector"], [PROJECTOR], ["lm_head"], ["multi_modal_projector", "lm_head"]]
)
def test_modules_to_save_reload_equal_and_unload(names: list[str], tmp_path: Path) -> None:
    host = llava()
    base = frozen_logits(host)
    model = attach(host.model, modules_to_save=names)
    randomise(model)
    train_steps(model, host.batch)
    expected = logits(model.eval(), host.batch)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(llava().model, str(tmp_path))
    assert_equal(logits(loaded, host.batch), expected)
    with model.disable_adapter():
        assert_equal(logits(model, host.batch), base)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, host.batch), expected, atol=1e-4, rtol=1e-4)
    unloaded = model.unload()
    assert not [path for path, _ in unloaded.named_modules() if "crome" in path or "modules_to_save" in path]


def test_modules_to_save_in_two_adapters_are_two_copies() -> None:
    host = llava()
    config = {"bottleneck_dim": 4, "modules_to_save": ["multi_modal_projector"]}
    model = attach(host.model, modules_to_save=["multi_modal_projector"])
    model.add_adapter("other", CromeConfig(**config))
    randomise(model)
    train_steps(model, host.batch)
    copies = f"base_model.model.{PROJECTOR}.base_layer.modules_to_save"
    trained = model.get_parameter(f"{copies}.default.linear_1.weight")
    assert not torch.equal(trained, model.get_parameter(f"{copies}.other.linear_1.weight"))
    model.set_adapter("other")
    assert {path for path in trainable(model) if "modules_to_save" in path} == {
        f"{copies}.other.linear_{i}.{what}" for i in (1, 2) for what in ("weight", "bias")
    }


@pytest.mark.parametrize("indices", [[5, 6], {"embed_tokens": [5, 6]}], ids=["list", "dict"])
def test_trainable_tokens_train_inside_the_text_site(indices: list | dict, tmp_path: Path) -> None:
    host = llava()
    model = attach(host.model, trainable_token_indices=indices)
    randomise(model)
    before = snapshot(model)
    train_steps(model, host.batch)
    others = changed(model, before) - {f"base_model.model.crome.{key}.default.weight" for key in KEYS}
    assert len(others) == 1
    assert "token_adapter.trainable_tokens_delta.default" in others.pop()
    expected = logits(model.eval(), host.batch)
    model.save_pretrained(tmp_path)
    assert_equal(logits(PeftModel.from_pretrained(llava().model, tmp_path), host.batch), expected)


def test_a_configuration_can_be_used_for_another_model() -> None:
    config = CromeConfig(bottleneck_dim=4, modules_to_save=["multi_modal_projector"])
    for _ in range(2):
        get_peft_model(llava().model, config)
        assert config.modules_to_save == ["multi_modal_projector"]
        assert config.trained_on is None
