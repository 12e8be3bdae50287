"""Test that harmful adapter files are refused with a reason before the model changes. Anyone can share files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from peft_crome import CromeConfig
from peft_crome.sharing.weight_file import read_adapter_file
from peft_crome.training import save_stage
from tests.tuner.helpers import adapted, assert_equal, assert_message, attach, frozen_logits, logits, unchanged
from tests.zoo.llava import llava

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP = "base_model.model.crome.crome_up.weight"
FORMAT = {"format": "pt"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "adapter"
    adapted(llava()).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Return one model for all tests, because a refusal leaves it unchanged."""
    return llava().model


def refused(model: nn.Module, folder: Path, *parts: str) -> None:
    with unchanged(model), pytest.raises((ValueError, TypeError)) as error:
        PeftModel.from_pretrained(model, folder)
    assert_message(error.value, *parts)


def set_tensor(folder: Path, key: str, value: torch.Tensor) -> None:
    save_file({**load_file(folder / FILE), key: value}, folder / FILE, metadata=FORMAT)


def write_header(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, adapter: Path, model: nn.Module
) -> None:
    up = load_file(adapter / FILE)[UP].to(dtype)
    up[-1, -1] = value
    set_tensor(adapter, UP, up)
    refused(model, adapter, FILE, "NaN or infinite", UP, "diverged")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype, adapter: Path, model: nn.Module) -> None:
    set_tensor(adapter, UP, load_file(adapter / FILE)[UP].to(dtype))
    refused(model, adapter, "another dtype than ('F32', 'F16', 'BF16')", UP, "model.to(torch.float32)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_loads(dtype: torch.dtype, adapter: Path) -> None:
    for key, tensor in load_file(adapter / FILE).items():
        set_tensor(adapter, key, tensor.to(dtype))
    host = llava()
    assert torch.isfinite(logits(PeftModel.from_pretrained(host.model, adapter), host.batch)).all()


def one(dtype: str = "F32", shape: tuple[int, ...] = (1,), offsets: tuple[int, int] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS: dict[str, tuple[Any, bytes, int | None]] = {
    "longer than the file": ({UP: one()}, b"0000", 2**20),
    "of 2^63 bytes": ({UP: one()}, b"0000", 2**63),
    "of 20 MB": (json.dumps({UP: one()}).encode().ljust(20_000_000), b"0000", None),
    "that overlaps": ({UP: one(), UP + "2": one()}, b"0000", None),
    "with a gap": ({UP: one(offsets=(4, 8))}, b"0" * 8, None),
    "that ends early": ({UP: one()}, b"0" * 8, None),
    "past the end": ({UP: one(shape=(1024,), offsets=(0, 4096))}, b"0000", None),
    "with offsets the wrong way round": ({UP: one(offsets=(4, 0))}, b"0000", None),
    "with negative offsets": ({UP: one(offsets=(-4, 0))}, b"0000", None),
    "whose size overflows": ({UP: one(shape=(2**40, 2**40))}, b"0000", None),
    "of nested brackets": (b'{"a":' * 100_000, b"", None),
    "that is a list": (b"[]", b"", None),
    "that is empty": ({}, b"", None),
    "with an empty tensor": ({UP: one(shape=(0, 2**60), offsets=(0, 0))}, b"", None),
    "with an unknown dtype": ({UP: one("PICKLE")}, b"0000", None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_refused(name: str, adapter: Path, model: nn.Module) -> None:
    write_header(adapter, *HEADERS[name])
    refused(model, adapter, FILE if name != "with an empty tensor" else "crome_up.weight has shape")


keys = st.sampled_from([UP, "__metadata__", "", "../../x", "base_model.model.crome.crome_gate_text.weight", "a\x00b"])
numbers = st.integers(-(2**65), 2**65) | st.integers(0, 64)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "F8_E4M3", "F4", "U64", "", 1]),
        "shape": st.lists(numbers),
        "data_offsets": st.lists(numbers, max_size=3),
    },
    optional={"more": st.none()},
)
json_values = st.recursive(st.none() | st.booleans() | numbers | st.floats() | st.text(), st.lists, max_leaves=5)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(header=st.dictionaries(keys, entries | json_values, max_size=4) | st.binary(), data=st.binary(max_size=64))
def test_no_header_gets_past_the_check(header: Any, data: bytes, adapter: Path) -> None:
    write_header(adapter, header, data)
    with contextlib.suppress(ValueError):
        found = read_adapter_file(str(adapter))
        assert found is not None
        assert set(found.crome) <= {"crome_up.weight", "crome_gate_text.weight"}
        size = sum(math.prod(shape) for shape in found.crome.values())
        assert size <= len(data), "a file cannot hold more than its bytes"


@fuzz
@given(place=st.integers(0, 1200), value=st.integers(0, 255))
def test_no_changed_byte_changes_the_model_when_it_is_refused(
    place: int, value: int, adapter: Path, original: Path, model: nn.Module
) -> None:
    content = bytearray((original / FILE).read_bytes())
    content[place] = value
    (adapter / FILE).write_bytes(content)
    before = {name: id(module) for name, module in model.named_modules()}
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = PeftModel.from_pretrained(model, adapter)
    except ValueError:
        assert {name: id(module) for name, module in model.named_modules()} == before
    else:  # a byte of a weight, or of nothing that matters
        loaded.unload()


def test_tokens_beyond_the_table_are_refused() -> None:
    host = llava()
    with unchanged(host.model), pytest.raises(ValueError, match="is beyond the model's"):
        attach(host.model, trainable_token_indices=[10**9])


def test_weights_of_the_host_that_no_field_names_are_refused(adapter: Path, model: nn.Module) -> None:
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("mlp.down_proj.weight"))
    set_tensor(adapter, f"base_model.model.{name}", torch.zeros_like(weight))
    refused(model, adapter, "neither CROME's nor of a module in modules_to_save=None", name, "overwrite")


def test_a_table_in_the_file_is_announced(adapter: Path) -> None:
    host = llava()
    path = next(n for n, m in host.model.named_modules() if m is host.model.get_input_embeddings())
    set_tensor(adapter, f"base_model.model.{path}.base_layer.weight", host.model.get_input_embeddings().weight.clone())
    with pytest.warns(UserWarning, match="the model's own .* replaces them"):
        PeftModel.from_pretrained(host.model, adapter)


def test_trained_modules_load_and_misshapen_ones_are_refused(tmp_path: Path, model: nn.Module) -> None:
    adapted(llava(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    host = llava()
    loaded = PeftModel.from_pretrained(host.model, tmp_path)
    loaded.load_adapter(str(tmp_path), "second")
    key = next(key for key in load_file(tmp_path / FILE) if "lm_head" in key)
    set_tensor(tmp_path, key, torch.full_like(load_file(tmp_path / FILE)[key], float("nan")))
    refused(model, tmp_path, "NaN", "lm_head")
    config = json.loads((tmp_path / CONFIG).read_text())
    vision = next(n for n, p in model.named_parameters() if n.endswith("linear_1.weight"))
    bias = dict(model.named_parameters())[vision.replace("weight", "bias")]
    (tmp_path / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["linear_1"], "branches": {
        "text": ["embed_tokens"], "vision": ["linear_2"]}}))  # fmt: skip
    tensors = {k: v for k, v in load_file(tmp_path / FILE).items() if "lm_head" not in k}
    added = {vision: torch.zeros(3, 3), vision.replace("weight", "bias"): torch.zeros_like(bias)}
    added = {f"base_model.model.{name}": tensor for name, tensor in added.items()}
    save_file({**tensors, **added}, tmp_path / FILE, metadata=FORMAT)
    refused(model, tmp_path, "has shape (3, 3), the model's is", "linear_1")


def test_a_link_into_a_snapshot_loads_and_a_pipe_is_refused(adapter: Path, model: nn.Module) -> None:
    blob = adapter.parent / "blobs" / "0123abcd"
    blob.parent.mkdir()
    (adapter / FILE).rename(blob)
    (adapter / FILE).symlink_to(Path("..") / "blobs" / "0123abcd")
    host = llava()
    PeftModel.from_pretrained(host.model, adapter)
    (adapter / FILE).unlink()
    os.mkfifo(adapter / FILE)
    refused(model, adapter, "not a regular file")


@pytest.mark.parametrize("name", ["/etc/cron.d/x", "../x", "a/b", "a\\b", "a\0b", " "])
def test_an_adapter_s_name_is_no_path(name: str) -> None:
    host = llava()
    with unchanged(host.model), pytest.raises(ValueError, match="adapter_name="):
        attach(host.model, name)


def set_field(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "bottleneck_dim of 2^40": ({"bottleneck_dim": 2**40}, "bottleneck_dim=1099511627776 is not between 1 and 16384"),
    "bottleneck_dim that is not the file's": ({"bottleneck_dim": 8192}, "this model needs (8192, 32)"),
    "bottleneck_dim as text": ({"bottleneck_dim": "256"}, "bottleneck_dim='256' is not an int"),
    "branches as a word": ({"branches": "text"}, "is neither a list of names nor a dict"),
    "branches that the file has more of": ({"branches": ["text"]}, "unexpected keys ['crome_down_vision.weight'"),
    "branches of numbers": ({"branches": {"text": [1]}}, "is neither a list of names nor a regex"),
    "branches with a path for a name": ({"branches": {"../text": ["embed_tokens"]}}, "is not an identifier"),
    "a pattern of a million letters": ({"branches": {"text": "a" * 10**6}}, "has 1000000 characters"),
    "modules_to_save of numbers": ({"modules_to_save": [1]}, "is not a list of names"),
    "modules_to_save as a dict": ({"modules_to_save": {"lm_head": 1}}, "is not a list of names"),
    "token indices as text": ({"trainable_token_indices": "all"}, "is not a list of token ids"),
    "token indices below zero": ({"trainable_token_indices": [-1]}, "is not a list of token ids"),
    "no token indices": ({"trainable_token_indices": []}, "is not a list of token ids"),
    "token indices beyond the table": (
        {"trainable_token_indices": [10**9]},
        "trained tokens, trainable_token_indices",
    ),
    "modules that the file lacks": ({"modules_to_save": ["lm_head"]}, "lacks ['lm_head.weight'], which modules_to"),
    "target_modules": ({"target_modules": ["q_proj"]}, "CROME's modules are named by branch"),
    "a base with code in its name": ({"base_model_name_or_path": 'x")\nimport os  #'}, "is neither a name nor a path"),
    "a base that is no text": ({"base_model_name_or_path": {"a": 1}}, "is neither a name nor a path"),
    "a revision that is no text": ({"revision": 1}, "is neither a name nor a path"),
    "auto_mapping as text": ({"auto_mapping": "os.system"}, "does not name a class and a module"),
    "auto_mapping of a call": (
        {"auto_mapping": {"base_model_class": "system('x')", "parent_library": "os"}},
        "does not name a class and a module",
    ),
    "trained_on as text": ({"trained_on": "x"}, "is not a dict"),
    "trained_on of a wrong type": ({"trained_on": {"embedding_rms": "x"}}, "is of a wrong type"),
    "gate_activation": ({"gate_activation": "eval"}, "gate_activation='eval' is unknown"),
    "dropout": ({"dropout": "0.1"}, "is not a probability"),
    "init_weights": ({"init_weights": "os.system"}, "init_weights='os.system' is unknown"),
    "inference_mode": ({"inference_mode": "yes"}, "inference_mode='yes' is not a bool"),
    "task_type": ({"task_type": "SHELL"}, "Invalid task type"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_refused(name: str, adapter: Path, model: nn.Module) -> None:
    fields, message = FIELDS[name]
    set_field(adapter, **fields)
    refused(model, adapter, message)


def test_unknown_fields_are_named_and_ignored(adapter: Path) -> None:
    set_field(adapter, __class__="os.system", on_load="import os", later=1)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['__class__', 'later', 'on_load'\]"):
        config = PeftConfig.from_pretrained(str(adapter))
    assert type(config) is CromeConfig


@fuzz
@given(field=st.sampled_from(sorted(CromeConfig().to_dict())), value=json_values | st.dictionaries(st.text(), numbers))
def test_no_field_of_any_type_changes_the_model_when_it_is_refused(
    field: str, value: Any, adapter: Path, original: Path
) -> None:
    shutil.copy(original / CONFIG, adapter / CONFIG)
    set_field(adapter, **{field: value})
    model = llava().model
    before = {name: id(module) for name, module in model.named_modules()}
    with warnings.catch_warnings(action="ignore"):
        try:
            PeftModel.from_pretrained(model, adapter)
        except (ValueError, TypeError, KeyError):  # PEFT looks peft_type up before CROME is asked
            after = {name: id(module) for name, module in model.named_modules()}
            assert after == before, (field, value)


PLANTED = "raise SystemExit('this module was imported')\n"


@pytest.mark.parametrize("library", ["planted", "planted.inside", "peft_crome.__main__", "peft_crome.cli.app", "os"])
def test_auto_mapping_imports_nothing_that_is_not_listed(
    library: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    set_field(adapter, auto_mapping={"base_model_class": "app", "parent_library": library})
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(adapter)
    assert "planted" not in sys.modules
    assert "peft_crome.__main__" not in sys.modules


def test_code_in_the_directory_is_never_executed(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__.py", "modeling.py", "conftest.py", "setup.py", "sitecustomize.py", "adapter.py"):
        (adapter / name).write_text(PLANTED)
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    monkeypatch.chdir(adapter)
    host = llava()
    expected = frozen_logits(host)
    loaded = PeftModel.from_pretrained(host.model, adapter)
    loaded.load_adapter(str(adapter), "second")
    assert not (adapter / "executed").exists()
    assert_equal(frozen_logits(llava()), expected)


@pytest.mark.parametrize("kind", ["nan", "code"])
def test_the_composite_s_own_loading_looks_first(kind: str, composite: Any, processor: Any, tmp_path: Path) -> None:
    save_stage(attach(composite), processor, tmp_path / "stage", {"stages": []}, "---\n---\n")
    tensors = load_file(tmp_path / "stage" / FILE)
    if kind == "code":
        (tmp_path / "stage" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
        (tmp_path / "stage" / FILE).unlink()
    else:
        set_tensor(tmp_path / "stage", UP, torch.full_like(tensors[UP], float("nan")))
    with pytest.raises(ValueError, match="a pickle may hold code" if kind == "code" else "NaN or infinite"):
        type(composite).from_pretrained(tmp_path / "stage")
