"""Test that every way to load an adapter gives the logits of the model that saved it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn

from peft_crome import CromeConfig, CromeLayer
from tests.tuner.helpers import (
    BOTH,
    FILE_KEYS,
    adapted,
    assert_equal,
    attach,
    crome_weight,
    file_keys,
    logits,
    trainable,
)
from tests.zoo.case import TEXT, Batch, words
from tests.zoo.llava import llava


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor, Batch]:
    """Save a backbone and an adapter. Return their directories, their logits together, and the batch."""
    folder = tmp_path_factory.mktemp("saved")
    llava().model.save_pretrained(folder / "base")
    host = llava()
    host.model = tf.LlavaForConditionalGeneration.from_pretrained(folder / "base").eval()
    model = adapted(host)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", logits(model, host.batch), host.batch


def base(path: Path) -> nn.Module:
    return tf.LlavaForConditionalGeneration.from_pretrained(path).eval()


def transformers_load_adapter(path: Path, adapter: Path) -> nn.Module:
    model = base(path)
    model.load_adapter(str(adapter))
    return model


def load_second(path: Path, adapter: Path) -> nn.Module:
    model = attach(base(path), "first")
    model.load_adapter(str(adapter), "second")
    model.set_adapter("second")
    return model


def set_state_dict(path: Path, adapter: Path) -> nn.Module:
    model = attach(base(path))
    set_peft_model_state_dict(model, load_peft_weights(str(adapter)))
    return model


def on_meta(path: Path, adapter: Path) -> nn.Module:
    """Attach an adapter to a backbone on the meta device, then load the values of both."""
    with torch.device("meta"):
        model = attach(tf.LlavaForConditionalGeneration(tf.AutoConfig.from_pretrained(path)))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    source = base(path)
    values = dict(source.named_parameters()) | dict(source.named_buffers())
    target = model.get_base_model()
    with torch.no_grad():
        for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
            if "crome_" not in name:
                tensor.copy_(values[name.replace(".base_layer", "")])
    set_peft_model_state_dict(model, load_peft_weights(str(adapter)))
    return model


WAYS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "PeftModel.from_pretrained": lambda path, adapter: PeftModel.from_pretrained(base(path), adapter),
    "low_cpu_mem_usage": lambda path, adapter: PeftModel.from_pretrained(base(path), adapter, low_cpu_mem_usage=True),
    "is_trainable": lambda path, adapter: PeftModel.from_pretrained(base(path), adapter, is_trainable=True),
    "load_adapter": load_second,
    "set_peft_model_state_dict": set_state_dict,
    "attached on meta": on_meta,
    "AutoPeftModel": lambda _, adapter: AutoPeftModel.from_pretrained(adapter),
    "transformers load_adapter": transformers_load_adapter,
    "transformers Auto class": lambda _, adapter: tf.AutoModelForImageTextToText.from_pretrained(adapter),
}


@pytest.mark.parametrize("way", WAYS)
def test_loading_gives_equal_logits(way: str, saved: tuple) -> None:
    path, adapter, expected, batch = saved
    model = WAYS[way](path, adapter).eval()
    sites = [module.crome_up for module in model.modules() if isinstance(module, CromeLayer)]
    assert len(sites) == 2
    assert sites[0] is sites[1]
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_equal(logits(model, batch), expected)


@pytest.mark.parametrize(("is_trainable", "expected"), [(False, 0), (True, 5)])
def test_loading_trains_only_when_asked(is_trainable: bool, expected: int, saved: tuple) -> None:
    path, adapter, _, _ = saved
    model = PeftModel.from_pretrained(base(path), adapter, is_trainable=is_trainable)
    assert len(trainable(model)) == expected
    model.load_adapter(str(adapter), "second", is_trainable=not is_trainable)
    assert len([name for name in trainable(model) if ".default." in name]) == expected


def test_auto_model_for_causal_lm_loads_a_text_only_host(tmp_path: Path) -> None:
    branches = {"text": ["embed_tokens"]}
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).save_pretrained(tmp_path / "base")
    model = attach(tf.LlamaForCausalLM.from_pretrained(tmp_path / "base"), branches=branches).eval()
    with torch.no_grad():
        nn.init.normal_(crome_weight(model, "up"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_equal(logits(loaded, words()), logits(model, words()))
    assert len(file_keys(tmp_path / "adapter")) == 3


def test_transformers_add_adapter_attaches_and_saves(tmp_path: Path, saved: tuple) -> None:
    path, _, _, batch = saved
    model = base(path)
    model.add_adapter(CromeConfig(branches=BOTH, bottleneck_dim=4, init_weights=False))
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(base(path), batch))
    model.save_pretrained(tmp_path)
    loaded = base(path)
    loaded.load_adapter(str(tmp_path))
    assert_equal(logits(loaded, batch), expected)
    model.disable_adapters()
    assert_equal(logits(model.requires_grad_(False), batch), logits(base(path).requires_grad_(False), batch))


def test_files_have_the_same_keys_whoever_saved_them(tmp_path: Path, saved: tuple) -> None:
    path, adapter, expected, batch = saved
    model = transformers_load_adapter(path, adapter)
    model.save_pretrained(tmp_path)
    assert file_keys(tmp_path) == file_keys(adapter) == FILE_KEYS
    assert_equal(logits(PeftModel.from_pretrained(base(path), tmp_path), batch), expected)


@pytest.mark.parametrize("settings", [{}, {"use_safetensors": False}])
def test_pickle_files_load_with_one_warning(settings: dict, tmp_path: Path, saved: tuple) -> None:
    path, adapter, expected, batch = saved
    PeftModel.from_pretrained(base(path), adapter).save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(torch.load(tmp_path / "adapter_model.bin", weights_only=True)) == FILE_KEYS
    with pytest.warns(UserWarning, match="is a pickle") as caught:
        loaded = PeftModel.from_pretrained(base(path), tmp_path, **settings)
    assert sum("is a pickle" in str(warning.message) for warning in caught) == 1
    assert_equal(logits(loaded, batch), expected)


def test_torch_state_dict_round_trip(tmp_path: Path, saved: tuple) -> None:
    path, adapter, expected, batch = saved
    torch.save(PeftModel.from_pretrained(base(path), adapter).state_dict(), tmp_path / "model.pt")
    model = attach(llava().model)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_equal(logits(model.eval(), batch), expected)


def test_saving_one_of_several_adapters(tmp_path: Path, saved: tuple) -> None:
    path, adapter, expected, batch = saved
    model = load_second(path, adapter)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "first").exists()
    assert file_keys(tmp_path / "second") == FILE_KEYS
    assert_equal(logits(PeftModel.from_pretrained(base(path), tmp_path / "second"), batch), expected)


def test_bf16_adapter_file_is_half_the_size(tmp_path: Path) -> None:
    model = attach(llava().model)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path)
        sizes.append(sum(v.nbytes for v in load_peft_weights(str(tmp_path)).values()))
    assert sizes == [640 * 4, 640 * 2]


@pytest.mark.parametrize("way", ["PEFT", "PEFT, by its configuration", "transformers"])
def test_an_adapter_of_before_the_default_left_words_out(way: str, tmp_path: Path) -> None:
    """An adapter without branches in its configuration loads with the branches in its file. Earlier releases saved no
    branches and had another default."""
    case = llava()
    model = adapted(case)
    expected = logits(model, case.batch)
    model.save_pretrained(tmp_path)
    written = tmp_path / "adapter_config.json"
    settings = json.loads(written.read_text())
    assert settings["branches"] == ["text", "vision"]
    written.write_text(json.dumps(settings | {"branches": None}))
    loaded: Any = llava().model
    if way == "transformers":
        loaded.load_adapter(str(tmp_path))
    else:
        config = {} if way == "PEFT" else {"config": PeftConfig.from_pretrained(tmp_path)}
        loaded = PeftModel.from_pretrained(loaded, tmp_path, **config)
    assert_equal(logits(loaded.eval(), case.batch), expected)
    if way == "PEFT":
        loaded.save_pretrained(tmp_path / "again")
        assert set(json.loads((tmp_path / "again" / "adapter_config.json").read_text())["branches"]) == {
            "text",
            "vision",
        }
