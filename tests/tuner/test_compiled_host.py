"""Test hosts that forward to another module: compiled hosts, hosts with a compiled part, and a user's own wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_crome import CromeConfig, CromeLayer, check, hotswap_adapter
from tests.tuner.helpers import (
    BOTH,
    assert_equal,
    attach,
    crome_weight,
    file_keys,
    logits,
    randomize,
    train_steps,
    trainable,
    unchanged,
)
from tests.tuner.test_hotswap import save_adapter
from tests.zoo.case import words
from tests.zoo.llava import llava

pytestmark = [
    # Dynamo's own, of any model whose graph breaks, with or without an adapter.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # Calls find their rows by the thread that they run in.
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `_thread.get_ident"),
]


class Wrapper(nn.Module):
    """Pass on every attribute of the host, as `OptimizedModule` does."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._modules["host"] = host

    def __getattr__(self, name: str) -> Any:
        return self._modules["host"] if name == "host" else getattr(self._modules["host"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["host"](*args, **kwargs)


class Holder(nn.Module):
    """Pass on no attribute of the host."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.backbone = host

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone(*args, **kwargs)


def compiled(host: nn.Module) -> nn.Module:
    return torch.compile(host, backend="eager")


def part_compiled(path: str) -> Any:
    def change(host: nn.Module) -> nn.Module:
        *parents, name = f"model.{path}".split(".")
        parent = host.get_submodule(".".join(parents))
        setattr(parent, name, compiled(getattr(parent, name)))
        return host

    return change


HOSTS = {
    "compiled": compiled,
    "compiled language model": part_compiled("language_model"),
    "compiled tower": part_compiled("vision_tower"),
    "compiled projector": part_compiled("multi_modal_projector"),
    "compiled table": part_compiled("language_model.embed_tokens"),
    "a user's module": Wrapper,
    "a user's module, compiled": lambda host: compiled(Wrapper(host)),
    "a user's module that hands nothing on": Holder,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("branches", [None, BOTH], ids=["vision", "both"])
@pytest.mark.parametrize("name", HOSTS)
def test_attach_train_save_reload_unload(name: str, branches: list[str] | None, tmp_path: Path) -> None:
    case = llava()
    both = []
    for host in (llava().model, HOSTS[name](case.model)):
        torch.manual_seed(0)
        both.append(attach(host, branches=branches))
        randomize(both[-1])
    plain, model = both
    assert_equal(logits(model.eval(), case.batch), logits(plain.eval(), case.batch))
    assert_equal(logits(model, words()), logits(plain, words()))
    losses = [train_steps(one.train(), case.batch) for one in (plain, model)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    model.train()(**words(), labels=words()["input_ids"]).loss.backward()
    expected = logits(plain.eval(), case.batch)
    torch.testing.assert_close(logits(model.eval(), case.batch), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    assert file_keys(tmp_path) == file_keys(tmp_path / "plain")
    for host in (llava().model, HOSTS[name](llava().model)):
        loaded = PeftModel.from_pretrained(host, tmp_path)
        torch.testing.assert_close(logits(loaded, case.batch), expected, rtol=1e-5, atol=1e-5)
    base = loaded.unload()
    assert not [key for key in base.state_dict() if "crome" in key]
    assert not [module for module in base.modules() if isinstance(module, CromeLayer)]
    assert_equal(logits(base, case.batch), logits(HOSTS[name](llava().model), case.batch))


@pytest.mark.parametrize("name", HOSTS)
def test_a_trained_projector_is_reloaded(name: str, tmp_path: Path) -> None:
    case = llava()
    model = attach(HOSTS[name](case.model), branches=None, modules_to_save=["multi_modal_projector"])
    randomize(model)
    train_steps(model.train(), case.batch)
    expected = logits(model.eval(), case.batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(HOSTS[name](llava().model), tmp_path)
    torch.testing.assert_close(logits(loaded, case.batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_an_error_leaves_the_host_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HOSTS[name](llava().model)
    before = logits(host, llava().batch)
    with unchanged(host), pytest.raises(ValueError, match="matches no module"):
        get_peft_model(host, CromeConfig(branches={"vision": ["no_such_module"]}))
    monkeypatch.setattr(CromeLayer, "_move_adapter_to_device_of_base_layer", _no_room)
    with unchanged(host), pytest.raises(MemoryError):
        get_peft_model(host, CromeConfig())
    assert "crome" not in host._modules
    assert_equal(logits(host, llava().batch), before)


def _no_room(*args: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("name", ["compiled", "a user's module"])
def test_second_adapter_rows_and_check(name: str) -> None:
    case = llava()
    model = attach(HOSTS[name](case.model), branches=None)
    model.add_adapter("other", CromeConfig(branches=["text"], bottleneck_dim=3))
    for adapter in ("default", "other"):
        randomize(model, adapter)
    model.eval()
    single = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        single[adapter] = logits(model, case.batch)
    with torch.no_grad():
        mixed = model(**case.batch, adapter_names=["default", "other"]).logits
    for row, adapter in enumerate(("default", "other")):
        torch.testing.assert_close(mixed[row], single[adapter][row], rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert trainable(model)
    assert [row.branch for row in check(model, case.batch) if row.gradient] == ["vision"]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", [*HOSTS, "DistributedDataParallel"])
def test_embeddings_and_description_are_the_inner_model_s(name: str, tmp_path: Path) -> None:
    """W_g is scaled by the inner model's embeddings. The recorded description is also the inner model's, so the
    adapter loads on it without a warning."""

    def host() -> nn.Module:
        model = llava().model
        model.get_input_embeddings().weight.data.mul_(0.1)
        return model

    config = {"bottleneck_dim": 64, "branches": {"vision": ["multi_modal_projector"]}}
    wrapped = HOSTS.get(name, DistributedDataParallel)(host())
    plain, model = attach(host(), **config), attach(wrapped, **config)
    spreads = [crome_weight(one, "gate_vision").std().item() for one in (plain, model)]
    assert spreads[0] > 10  # of embeddings as they come it is 1.4, and 0.18 where none are found
    assert spreads[1] == pytest.approx(spreads[0], rel=0.1)
    assert model.peft_config["default"].trained_on == plain.peft_config["default"].trained_on
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(host(), tmp_path)  # a warning would be an error


@pytest.mark.parametrize("name", HOSTS)
def test_hotswap(name: str, tmp_path: Path) -> None:
    model = attach(HOSTS[name](llava().model)).eval()
    expected = save_adapter(tmp_path)
    assert not torch.equal(logits(model, llava().batch), expected)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, llava().batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_merge_and_unmerge(name: str) -> None:
    case = llava()
    model = attach(HOSTS[name](case.model))
    randomize(model)
    expected = logits(model.eval(), case.batch)
    model.merge_adapter()
    tables = [module for module in model.modules() if isinstance(module, CromeLayer) and module.folded]
    assert len(tables) == 1
    torch.testing.assert_close(logits(model, case.batch), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_equal(logits(model, case.batch), expected)


@pytest.mark.parametrize("name", HOSTS)
def test_parameters_are_found_by_their_names(name: str) -> None:
    """`get_parameter` returns each parameter by its name, as TRL expects."""
    model = attach(HOSTS[name](llava().model))
    for path, parameter in model.named_parameters():
        assert model.get_parameter(path) is parameter
    base = model.unload()
    assert not hasattr(base, "crome")


@pytest.mark.parametrize("name", HOSTS)
def test_merge_and_unload(name: str) -> None:
    case = llava()
    model = attach(HOSTS[name](case.model), branches=["text"])
    randomize(model)
    expected = logits(model.eval(), case.batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, case.batch), expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == HOSTS[name](llava().model).state_dict().keys()
