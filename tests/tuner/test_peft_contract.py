"""Test what PEFT promises of every method in memory: adapters are added, switched and deleted, and the state stays
consistent."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_model_status, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.overrides import TorchFunctionMode

from peft_crome import CromeConfig, CromeLayer
from tests.tuner.helpers import (
    BOTH,
    FILE_KEYS,
    KEYS,
    adapted,
    assert_equal,
    assert_message,
    attach,
    crome_weight,
    frozen_logits,
    logits,
    randomize,
    snapshot,
    trainable,
    unchanged,
)
from tests.zoo.case import Case
from tests.zoo.llava import llava


def two_adapters() -> tuple[PeftModel, Case, dict[str, torch.Tensor]]:
    """Return a model with adapters "default" and "other", its case, and the logits of each adapter."""
    host = llava()
    model = adapted(host)
    model.add_adapter("other", CromeConfig(branches=BOTH, bottleneck_dim=3, gate_activation="sigmoid"))
    randomize(model, "other", seed=9)
    model.eval()
    answers = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        answers[name] = logits(model, host.batch)
    model.set_adapter("default")
    return model, host, answers


def assert_consistent(model: PeftModel, active: list[str], available: list[str], enabled: bool = True) -> None:
    status = get_model_status(model)
    assert status.active_adapters == active
    assert status.available_adapters == sorted(available)
    assert status.enabled is enabled
    assert "irregular" not in (status.enabled, status.active_adapters, status.merged_adapters)
    assert "irregular" not in [*status.requires_grad.values(), *status.devices.values()]
    for layer in model.get_layer_status():
        assert (layer.enabled, layer.active_adapters) == (enabled, active), layer.name
        assert layer.available_adapters == sorted(available), layer.name


def test_adapters_switch_by_name() -> None:
    model, host, answers = two_adapters()
    assert not torch.equal(answers["default"], answers["other"])
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert_equal(logits(model, host.batch), answers[name])
        assert {path.split(".")[-2] for path in trainable(model)} == {name}
        assert_consistent(model, [name], ["default", "other"])


def test_set_adapter_refuses_an_unknown_name() -> None:
    model, _, _ = two_adapters()
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")
    assert_consistent(model, ["default"], ["default", "other"])


def test_add_adapter_leaves_the_first_one_s_flags() -> None:
    model = attach(llava().model)
    before = trainable(model)
    model.add_adapter("other", CromeConfig(branches=BOTH, bottleneck_dim=3))
    assert trainable(model) == before
    assert_consistent(model, ["default"], ["default", "other"])


def test_delete_adapter_of_an_inactive_one() -> None:
    model, host, answers = two_adapters()
    model.delete_adapter("other")
    assert_equal(logits(model, host.batch), answers["default"])
    assert not [path for path, _ in model.named_parameters() if ".other." in path]
    assert_consistent(model, ["default"], ["default"])


def test_delete_adapter_of_the_active_one() -> None:
    model, host, answers = two_adapters()
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):  # PEFT's own
        model.delete_adapter("other")
    assert_equal(logits(model, host.batch), answers["default"])
    assert not [path for path, _ in model.named_parameters() if ".other." in path]


def test_delete_adapter_of_the_last_one_leaves_the_base() -> None:
    host = llava()
    expected = frozen_logits(host)
    model = adapted(host)
    model.delete_adapter("default")
    assert not [path for path, _ in model.named_parameters() if "crome_" in path]
    assert_equal(logits(model.base_model.model, host.batch), expected)  # PeftModel itself wants one, as with LoRA

    model.add_adapter("default", CromeConfig(branches=BOTH, bottleneck_dim=4))
    model.set_adapter("default")
    randomize(model)
    assert not torch.equal(logits(model, host.batch), expected)
    assert len(trainable(model)) == len(KEYS)


def test_disable_adapter_reports_it() -> None:
    model, _, _ = two_adapters()
    with model.disable_adapter():
        assert_consistent(model, ["default"], ["default", "other"], enabled=False)
    assert_consistent(model, ["default"], ["default", "other"])


def test_status_names_the_method_and_counts_parameters() -> None:
    model = attach(llava().model)
    status = get_model_status(model)
    assert status.peft_types == {"default": "CROME"}
    assert status.adapter_model_type == "CromeModel"
    assert status.trainable_params == 5 * 32 * 4
    assert status.num_adapter_layers == len(model.get_layer_status())


def test_print_trainable_parameters(capsys: pytest.CaptureFixture) -> None:
    attach(llava().model).print_trainable_parameters()
    assert "trainable params: 640 " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Adapter name 'crome' should not be contained")  # PEFT's own, before the error
@pytest.mark.parametrize("name", ["my.adapter", "weight", "crome_up", "model", "crome", "keys", "type"])
def test_adapter_names_that_a_file_could_not_tell_apart_are_refused(name: str) -> None:
    model = attach(llava().model, "first")
    with unchanged(model), pytest.raises(ValueError, match=re.escape(f"adapter_name={name!r}")) as error:
        model.add_adapter(name, CromeConfig(branches=BOTH, bottleneck_dim=4))
    assert_message(error.value, "Write adapter_name='default'")


@pytest.mark.parametrize("name", ["up", "default_2", "text", "my-adapter", "0", "a b"])
def test_adapter_names_may_be_any_other_word(name: str, tmp_path: Path) -> None:
    host = llava()
    model = adapted(host, name)
    expected = logits(model, host.batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llava().model, tmp_path / name, adapter_name=name)
    assert_equal(logits(loaded, host.batch), expected)


@pytest.mark.parametrize("name", ["default", "other"])
def test_state_dict_of_an_adapter_has_exactly_five_keys(name: str) -> None:
    model, _, _ = two_adapters()
    assert sorted(get_peft_model_state_dict(model, adapter_name=name)) == FILE_KEYS


def w_u_sites(model: nn.Module) -> list[nn.Module]:
    """Return the module that holds W_u, once for each site."""
    return [module.crome_up["default"] for module in model.modules() if isinstance(module, CromeLayer)]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_share_one_w_u_of_their_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    host = llava()
    model = attach(host.model)
    randomize(model)
    twin = duplicate(model)
    first, second = w_u_sites(twin)
    assert first is second is not w_u_sites(model)[0]
    assert_equal(logits(twin, host.batch), logits(model, host.batch))
    randomize(twin, seed=8)
    assert not torch.equal(logits(twin, host.batch), logits(model, host.batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_to_dtype_keeps_one_w_u(dtype: torch.dtype) -> None:
    model = adapted(llava()).to(dtype)
    first, second = w_u_sites(model)
    assert first is second
    assert first.weight is crome_weight(model, "up")
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_reaches_every_site(assign: bool) -> None:
    host = llava()
    source = adapted(host)
    expected, tensors = logits(source, host.batch), snapshot(source)
    target = attach(llava().model).eval()
    target.load_state_dict(tensors, assign=assign)
    assert_equal(logits(target, host.batch), expected)
    assert w_u_sites(target)[0].weight is crome_weight(target, "up")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_adapter_dtype(base: torch.dtype, autocast: bool) -> None:
    model = get_peft_model(
        llava().model.to(base), CromeConfig(branches=BOTH, bottleneck_dim=4), autocast_adapter_dtype=autocast
    )
    assert {crome_weight(model, key.removeprefix("crome_")).dtype for key in KEYS} == {
        torch.float32 if autocast else base
    }
    model.add_adapter("other", CromeConfig(branches=BOTH, bottleneck_dim=4), autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in model.named_parameters() if ".other." in n} == {torch.float32 if autocast else base}


def test_inject_adapter_in_model_works_in_place() -> None:
    host = llava()
    expected = frozen_logits(host)
    model = inject_adapter_in_model(CromeConfig(branches=BOTH, bottleneck_dim=4), host.model)
    assert model is host.model
    assert_equal(logits(model, host.batch), expected)
    assert set(trainable(model)) == {f"crome.{key}.default.weight" for key in KEYS}
    assert sorted(get_peft_model_state_dict(model, adapter_name="default")) == [f"crome.{key}.weight" for key in KEYS]


class Moves(TorchFunctionMode):
    """Record which tensors are to move and to which device."""

    def __init__(self) -> None:
        self.moved: list[tuple[int, torch.device]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.to:
            self.moved.append((id(args[0]), args[1]))
        return function(*args, **kwargs or {})


def test_weights_are_moved_to_where_their_input_is() -> None:
    # Without a second device only the request can be seen: linear takes a CPU weight beside a meta input in silence.
    up = w_u_sites(attach(llava().model))[0]
    x = torch.empty(3, 4, device="meta")
    with Moves() as moves:
        up(x, x, "silu", None, 0.0)
    assert (id(up.weight), x.device) in moves.moved


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_a_merged_model_has_one_table_and_adapters_know_the_other() -> None:
    host = llava()
    expected = set(adapted(llava()).state_dict())
    rms = attach(llava().model).peft_config["default"].trained_on["embedding_rms"]
    model = adapted(host)
    model.merge_adapter()
    assert set(model.state_dict()) == expected
    model.add_adapter("other", CromeConfig(branches=BOTH, bottleneck_dim=4))
    assert model.peft_config["other"].trained_on["embedding_rms"] == rms
    model.half()
    model.unmerge_adapter()
    table = llava().model.get_input_embeddings().weight
    assert_equal(model.get_input_embeddings().weight.detach(), table.half())


def test_a_vocabulary_that_grew_is_still_the_same_backbone(tmp_path: Path) -> None:
    """An adapter loads without a warning on its backbone after the vocabulary has grown. The table has a realistic
    size, because eight of the old tokens are compared."""

    def host(rows: int) -> nn.Module:
        return llava(vocab_size=rows).model

    small = host(2048)
    attach(small).save_pretrained(tmp_path)
    grown = host(2048)
    grown.resize_token_embeddings(2060)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(grown, tmp_path)
    assert not [str(w.message) for w in caught if "trained on" in str(w.message)]
