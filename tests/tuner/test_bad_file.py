"""Test that a wrong adapter file or backbone gives one error with what does not fit, and that nothing changes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tuner.helpers import adapted, assert_message, logits, unchanged
from tests.zoo.case import words
from tests.zoo.llava import llava

FILE = "adapter_model.safetensors"


def drop_key(file: Path) -> None:
    tensors = load_file(file)
    del tensors["base_model.model.crome.crome_up.weight"]
    save_file(tensors, file)


def add_key(file: Path) -> None:
    save_file(load_file(file) | {"base_model.model.crome.crome_gate_audio.weight": torch.zeros(4, 32)}, file)


def widen(file: Path) -> None:
    save_file(
        {key: torch.zeros([n * 2 if n == 32 else n for n in t.shape]) for key, t in load_file(file).items()}, file
    )


def deepen(file: Path) -> None:
    save_file({key: torch.zeros([8 if n == 4 else n for n in t.shape]) for key, t in load_file(file).items()}, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5])


def make_text(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\n" * 4)


def make_lora(file: Path) -> None:
    lora = get_peft_model(llava().model, LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(file.parent / "lora")
    (file.parent / "lora" / FILE).replace(file)


def add_foreign_key(file: Path) -> None:
    save_file(load_file(file) | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, file)


FILES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing key": (drop_key, ["missing keys ['crome_up.weight']"]),
    "unexpected key": (add_key, ["unexpected keys ['crome_gate_audio.weight']"]),
    "other width": (widen, ["crome_up.weight has shape (64, 4), this model needs (32, 4)", "hidden_size 32"]),
    "other bottleneck": (deepen, ["crome_gate_text.weight has shape (8, 32), this model needs (4, 32)"]),
    "truncated": (truncate, [FILE, "truncated or not a safetensors file", "Download or save the adapter again"]),
    "truncated header": (truncate_header, [FILE, "truncated or not a safetensors file"]),
    "text": (make_text, [FILE, "truncated or not a safetensors file"]),
    "LoRA": (make_lora, [FILE, "holds no CROME weights", "lora_A", "Load it with the PEFT method that wrote it"]),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted(llava()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(how: str, model: nn.Module, folder: Path) -> None:
    if how == "from_pretrained":
        PeftModel.from_pretrained(model, folder)
    else:
        model.load_adapter(str(folder), "second")


def receiver(how: str) -> nn.Module:
    return llava().model if how == "from_pretrained" else adapted(llava())


each_way = pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])


@each_way
@pytest.mark.parametrize("case", FILES)
def test_load_refuses_a_wrong_file(case: str, how: str, adapter: Path) -> None:
    spoil, parts = FILES[case]
    spoil(adapter / FILE)
    model = receiver(how)
    with unchanged(model, adapter), pytest.raises(ValueError) as error:  # noqa: PT011  # checked by assert_message
        load(how, model, adapter)
    assert_message(error.value, *parts)


@each_way
def test_load_refuses_a_file_with_another_method_s_keys(how: str, adapter: Path) -> None:
    add_foreign_key(adapter / FILE)
    model = receiver(how)
    with unchanged(model, adapter), pytest.raises(ValueError, match="lora_A"):
        load(how, model, adapter)


class Planted:
    """Run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@each_way
@pytest.mark.filterwarnings("ignore:.*is a pickle")
@pytest.mark.parametrize("kind", ["code", "code beside tensors", "no tensors", "truncated", "not finite"])
def test_load_refuses_a_pickle_that_is_not_tensors_alone(
    kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapted(llava()).save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "adapter_model.bin"
    tensors = torch.load(file, weights_only=True)
    key = "base_model.model.crome.crome_up.weight"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        others = {"code": Planted(), "code beside tensors": {**tensors, "crome_other": Planted()}, "no tensors": [1]}
        torch.save(others.get(kind, {**tensors, key: tensors[key] * float("nan")}), file)
    model = receiver(how)
    with unchanged(model, tmp_path), pytest.raises(ValueError, match=r"adapter_model\.bin (is|holds)"):
        load(how, model, tmp_path)
    assert not (tmp_path / "executed").exists()


DAMAGED: dict[str, Any] = {
    "text": b"hello world",
    "page": b"<!DOCTYPE html><html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
    "empty": b"",
    "zeros": bytes(64),
    "bare pickle": pickle.dumps({"a": 1}),
    "number as key": lambda tensors, key: tensors | {5: tensors[key]},
    "sparse": lambda tensors, key: tensors | {key: tensors[key].to_sparse()},
    "sparse by rows": lambda tensors, key: tensors | {key: tensors[key].to_sparse_csr()},
    "without values": lambda tensors, key: tensors | {key: tensors[key].to("meta")},
    "complex": lambda tensors, key: tensors | {key: tensors[key].to(torch.complex64)},
    "nested": lambda tensors, key: {"state_dict": tensors},
}


@each_way
@pytest.mark.filterwarnings("ignore:.*is a pickle")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", DAMAGED)
def test_load_refuses_a_damaged_pickle_by_its_name(kind: str, how: str, tmp_path: Path) -> None:
    adapted(llava()).save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "adapter_model.bin"
    damaged = DAMAGED[kind]
    if isinstance(damaged, bytes):
        file.write_bytes(damaged)
    else:
        torch.save(damaged(torch.load(file, weights_only=True), "base_model.model.crome.crome_up.weight"), file)
    model = receiver(how)
    remedy = r"adapter_model\.bin (is|holds).*(Ask its author|Save it again|Download or save)"
    with unchanged(model, tmp_path), pytest.raises(ValueError, match=f"(?s){remedy}"):
        load(how, model, tmp_path)


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_load_refuses_a_pickle_with_missing_keys(tmp_path: Path) -> None:
    adapted(llava()).save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "adapter_model.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors["base_model.model.crome.crome_up.weight"]
    torch.save(tensors, file)
    model = llava().model
    with unchanged(model, tmp_path), pytest.raises(ValueError, match=r"missing keys \['crome_up.weight'\]"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("case", FILES)
def test_transformers_load_adapter_never_takes_a_wrong_file_silently(
    case: str, adapter: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    # transformers reads the configuration by PeftConfig.from_pretrained, so CROME's check of the file is not asked,
    # and goes on after a report of its own where a key is missing: as it does for every PEFT method.
    FILES[case][0](adapter / FILE)
    try:
        llava().model.load_adapter(str(adapter))
    except (RuntimeError, ValueError, SafetensorError):
        return
    report = caplog.text + capsys.readouterr().err
    assert "LOAD REPORT" in report
    assert any(status in report for status in ("MISSING", "UNEXPECTED", "MISMATCH"))


def test_load_refuses_a_model_of_another_width(adapter: Path) -> None:
    model = llava(hidden_size=64).model
    with (
        unchanged(model, adapter),
        pytest.raises(ValueError, match="does not fit LlavaForConditionalGeneration") as error,
    ):
        PeftModel.from_pretrained(model, adapter)
    assert_message(error.value, "(hidden_size 64)", "shape (32, 4), this model needs (64, 4)", "it was trained on")


def test_load_warns_of_another_backbone_and_names_both(adapter: Path) -> None:
    other = llava().model
    other.name_or_path = "someone/other-llava"
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    with pytest.warns(UserWarning, match="This adapter was trained on 'LlavaForConditionalGeneration'") as record:
        PeftModel.from_pretrained(other, adapter)
    crome = [w for w in record if "This adapter was trained on" in str(w.message)]
    assert len(crome) == 1
    assert_message(crome[0].message, "'someone/other-llava'", "(llava)")
    assert crome[0].filename == __file__, "the warning points at the caller"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_is_silent_for_the_same_weights_under_another_path(
    adapter: Path, dtype: torch.dtype, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    llava().model.save_pretrained(tmp_path / "moved")
    model = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "moved", dtype=dtype)
    loaded = PeftModel.from_pretrained(model, adapter)
    assert not [w for w in recwarn if "This adapter was trained on" in str(w.message)]
    assert torch.isfinite(logits(loaded, words())).all()
