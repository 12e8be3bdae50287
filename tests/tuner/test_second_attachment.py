"""Test a model that had an adapter before: from a notebook's cell that ran twice, a loaded configuration, or a
merge."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_crome import CromeConfig
from tests.tuner.helpers import (
    BOTH,
    M,
    adapted,
    assert_equal,
    attach,
    crome_weight,
    frozen_logits,
    logits,
    randomize,
    unchanged,
)
from tests.zoo import ZOO

llava = ZOO["llava"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model"),
]


def test_the_same_name_again_is_a_fresh_adapter(tmp_path: Path) -> None:
    """A second attachment under the same name gives a fresh adapter, as with LoRA. The first one's weights would have
    the first configuration's size."""
    case = llava()
    expected = frozen_logits(case)
    adapted(case)
    again = get_peft_model(
        case.model, CromeConfig(branches=BOTH, bottleneck_dim=2 * M, gate_activation="sigmoid")
    ).eval()
    assert crome_weight(again, "up").shape[1] == 2 * M
    assert again.get_base_model().crome.settings["default"][0] == "sigmoid"
    assert_equal(logits(again, case.batch), expected)
    randomize(again)
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llava().model, tmp_path).eval()
    assert_equal(logits(loaded, case.batch), logits(again, case.batch))


def test_the_same_name_again_leaves_the_others() -> None:
    case = llava()
    model = adapted(case, adapter_name="kept")
    model.add_adapter("default", CromeConfig(branches=BOTH, bottleneck_dim=M))
    expected = logits(model, case.batch)
    again = get_peft_model(case.model, CromeConfig(branches=BOTH, bottleneck_dim=2 * M)).eval()
    again.base_model.set_adapter("kept")
    assert_equal(logits(again, case.batch), expected)


def test_a_second_attachment_that_fails_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    case = llava()
    model = adapted(case)
    expected = logits(model, case.batch)

    def fail(*arguments: object) -> None:
        raise RuntimeError("in the middle")

    from peft_crome.tuner.layer import CromeLayer

    monkeypatch.setattr(CromeLayer, "_move_adapter_to_device_of_base_layer", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        get_peft_model(case.model, CromeConfig(branches=BOTH, bottleneck_dim=2 * M))
    assert_equal(logits(model, case.batch), expected)
    assert crome_weight(model, "up").shape[1] == M


def test_an_attachment_that_fails_at_its_end_is_taken_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that `modules_to_save` trains goes as well."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_crome.tuner.model.tie_trained_tokens", interrupt)
    host = llava().model
    config = CromeConfig(branches=BOTH, bottleneck_dim=M, modules_to_save=["lm_head"])
    before = config.to_dict()
    with unchanged(host), pytest.raises(KeyboardInterrupt):
        get_peft_model(host, config)
    assert config.to_dict() == before


def test_a_loaded_configuration_serves_a_new_adapter(tmp_path: Path) -> None:
    """A loaded configuration works for a new adapter, even after its directory is gone. Its file belongs only to the
    adapter that it was read for."""
    adapted(llava()).save_pretrained(tmp_path)
    config = CromeConfig.from_pretrained(tmp_path)
    config.bottleneck_dim = 2 * M
    assert crome_weight(get_peft_model(llava().model, config), "up").shape[1] == 2 * M
    model = PeftModel.from_pretrained(llava().model, tmp_path)
    shutil.rmtree(tmp_path)  # a checkpoint that rotated away
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert crome_weight(model, "up", "other").shape[1] == M


@pytest.mark.parametrize("way", ["config", "load_adapter"])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.model.language_model.norm.weight", "would overwrite the model's own"),
        ("base_model.model.crome.crome_up.weight", "NaN or infinite"),
    ],
    ids=["the host's", "NaN"],
)
def test_a_stranger_s_file_is_refused_whichever_way_it_comes(way: str, key: str, message: str, tmp_path: Path) -> None:
    adapted(llava()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    own = llava().model.state_dict().get(key.removeprefix("base_model.model."))
    given = own if own is not None else load_file(file)[key]
    save_file(load_file(file) | {key: torch.full_like(given, float("nan" if "crome" in key else "0"))}, file)
    case = llava()
    state = copy.deepcopy(case.model.state_dict())
    if way == "config":
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(case.model, tmp_path, config=PeftConfig.from_pretrained(tmp_path))
    else:
        model = attach(case.model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path, "default")
    now = {name.replace(".base_layer.", "."): value for name, value in case.model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in state.items())


def test_adapters_that_were_merged_before_are_unloaded_too() -> None:
    case = llava()
    model = adapted(case, adapter_name="a", branches=["text"])
    model.add_adapter("b", CromeConfig(branches=["text"], bottleneck_dim=M))
    randomize(model, "b", seed=5)
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, case.batch)
    model.set_adapter("a")
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match=r"were merged a\. You are now additionally merging b"):
        merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(logits(merged, case.batch), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("branches", [None, BOTH], ids=["vision", "both"])
def test_another_method_s_merge_leaves_the_adapter_in_place(branches: list[str] | None) -> None:
    case = llava()
    inner = adapted(case, adapter_name="images", branches=branches).get_base_model()
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(inner, lora, adapter_name="words").eval()
    expected = logits(model, case.batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, case.batch), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in merged.state_dict() if "lora_" in name]
    again = get_peft_model(merged, CromeConfig(bottleneck_dim=M), adapter_name="images").eval()
    assert not torch.equal(logits(again, case.batch), expected)  # the old one made room, and the new one adds nothing


def test_initialized_by_an_offloaded_table() -> None:
    """An offloaded table scales the initial weights as one in memory does. accelerate fetches its weight for each
    call."""
    deviations = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        host = llava().model
        if offloaded:
            cpu_offload(host, execution_device=torch.device("cpu"))
        deviations.append(crome_weight(attach(host), "gate_text").std().item())
    assert deviations[1] == pytest.approx(deviations[0], rel=0.1)
