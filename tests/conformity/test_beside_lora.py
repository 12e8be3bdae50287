"""Test CROME and LoRA on one model. Either both act and both are saved, or there is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_crome import CromeConfig
from tests.tuner.helpers import assert_equal, changed, logits, snapshot, train_steps
from tests.zoo.llava import llava

SECOND = "ignore:You are trying to modify a model with PEFT for a second time:UserWarning"
SHARED = "ignore:Already found a `peft_config` attribute:UserWarning"
NAMES = {"crome": "images", "lora": "words"}
pytestmark = [pytest.mark.filterwarnings(SECOND), pytest.mark.filterwarnings(SHARED)]


def config(method: str) -> Any:
    if method == "crome":
        return CromeConfig(bottleneck_dim=4, init_weights=False)
    return LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)


def both(model: nn.Module, order: tuple[str, str]) -> tuple[PeftModel, PeftModel]:
    first = get_peft_model(model, config(order[0]), adapter_name=NAMES[order[0]])
    return first, get_peft_model(first.get_base_model(), config(order[1]), adapter_name=NAMES[order[1]])


@pytest.mark.parametrize("order", [("lora", "crome"), ("crome", "lora")], ids=" then ".join)
def test_one_after_the_other_both_act_train_and_are_saved(order: tuple[str, str], tmp_path: Path) -> None:
    host = llava()
    first, second = both(host.model, order)
    with_both = logits(second.eval(), host.batch)
    for name, parameter in second.named_parameters():  # PEFT freezes the first, as the second's base model
        parameter.requires_grad_("crome_" in name or "lora_" in name)
    before = snapshot(second)
    train_steps(second, host.batch, steps=1, rate=0.01)
    moved = changed(second, before)
    assert {word for word in ("crome_", "lora_") for name in moved if word in name} == {"crome_", "lora_"}
    assert all("crome_" in name or "lora_" in name for name in moved)
    expected = logits(second.eval(), host.batch)
    assert not torch.equal(expected, with_both)
    for model, method in ((first, order[0]), (second, order[1])):
        model.save_pretrained(tmp_path, selected_adapters=[NAMES[method]])
    for again in (order, order[::-1]):
        model: Any = llava().model
        for method in again:
            found = PeftModel.from_pretrained(model, tmp_path / NAMES[method], adapter_name=NAMES[method])
            model = found.get_base_model()
        assert_equal(logits(found.eval(), host.batch), expected)


def test_one_name_for_two_methods_is_refused_before_anything_is_lost() -> None:
    model = get_peft_model(llava().model, config("lora"))
    with pytest.raises(ValueError, match=r"'default' is on this model already.*adapter_name='images'"):
        get_peft_model(model.get_base_model(), config("crome"))
    assert type(model.peft_config["default"]) is LoraConfig


@pytest.mark.parametrize("order", [("lora", "crome"), ("crome", "lora")], ids=" then ".join)
def test_adding_one_to_a_model_of_the_other_is_one_clear_error(order: tuple[str, str]) -> None:
    model = get_peft_model(llava().model, config(order[0]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", config(order[1]))


@pytest.mark.parametrize("method", ["crome", "lora"])
def test_mixed_models_say_which_methods_they_take(method: str) -> None:
    def attach() -> None:
        model = get_peft_model(llava().model, config(method), mixed=True)
        model.add_adapter("second", config("crome"))

    with pytest.raises(ValueError, match="'CROME' is not compatible with the `PeftMixedModel`"):
        attach()
