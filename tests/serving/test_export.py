"""Test what `export` writes for vLLM, without vLLM. The tests in tests/engine serve it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from peft_crome import CromeConfig
from peft_crome.cli import app
from peft_crome.serving import export, host_files
from peft_crome.serving.export import load_for_export
from peft_crome.serving.served import WEIGHTS, Served
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.test_mixed_batch import qformer_composite
from tests.tuner.helpers import assert_equal, attach, changed, logits, randomize, snapshot
from tests.vlm.tiny import build, make_batch
from tests.zoo import ZOO

SITE = "model.multi_modal_projector"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    save_tokenizer_and_model(tmp_path / "host")
    return tmp_path / "host"


def save_adapters(host: Path, folder: Path, *names: str, **settings: Any) -> PeftModel:
    model = attach(AutoModelForImageTextToText.from_pretrained(host), names[0], **{"branches": ["vision"], **settings})
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    for seed, name in enumerate(names):
        randomize(model, name, seed)
    model.eval().save_pretrained(folder)
    return model


def matrices(folder: Path, name: str) -> dict[str, torch.Tensor]:
    written = load_file(folder / WEIGHTS)
    return {key.replace(f".{name}.", "."): weight for key, weight in written.items() if f".{name}." in key}


def weights_of(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    state = model.base_model.crome.state_dict(prefix="crome.")
    return {key.replace(f".{name}.", "."): weight for key, weight in state.items() if f".{name}." in key}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["100GB", "20KB"])
def test_a_host_in_a_directory_is_copied_as_it_is(
    host: Path, size: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An export copies a host's sharded files, index and dtype as they are. It does not load the host's weights."""
    AutoModelForImageTextToText.from_pretrained(host, dtype=dtype).save_pretrained(host, max_shard_size=size)
    if size == "20KB":
        (host / "model.safetensors").unlink()
    model = save_adapters(host, tmp_path, "red", "green")
    arguments = [str(tmp_path / "red"), f"verde={tmp_path / 'green'}", str(tmp_path / "served")]
    with caplog.at_level(logging.WARNING, "peft_crome"):
        result = CliRunner().invoke(app, ["export", *arguments, "--model", str(host)])
    assert result.exit_code == 0, result.output
    assert f"vllm serve {tmp_path / 'served'} --trust-request-mm-kwargs\n" in result.output
    assert "one of red, verde" in result.output
    assert "was not checked" in caplog.text
    served = tmp_path / "served"
    card = (served / "README.md").read_text()
    assert "vllm serve <this directory or repository> --trust-request-mm-kwargs\n```" in card
    assert "transformers loads the host alone from here" in card
    files = {path.name for path in host.iterdir()}
    for name in files - {"config.json", "model.safetensors.index.json"}:
        assert (served / name).read_bytes() == (host / name).read_bytes(), name
    assert {path.name for path in served.iterdir()} == files | {WEIGHTS, "README.md"}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (host, served))
    assert after.pop("architectures") == ["CromeLlavaForConditionalGeneration"]
    description = Served.of(after)
    del after["crome"], before["architectures"]
    assert after == before
    assert description.sites() == [SITE]
    assert (description.host, description.hidden_size, [*description.adapters]) == (None, 32, ["red", "verde"])
    for name, of in {"red": "red", "verde": "green"}.items():
        written, expected = matrices(served, name), weights_of(model, of)
        assert written.keys() == expected.keys()
        assert len(written) == 3
        assert all(torch.equal(written[key], expected[key]) for key in expected)
    if size == "20KB":
        index = json.loads((served / "model.safetensors.index.json").read_text())["weight_map"]
        assert {key for key, file in index.items() if file == WEIGHTS} == load_file(served / WEIGHTS).keys()


def test_a_host_on_the_hub_is_named(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_adapters(host, tmp_path, "default")
    asked: list[Any] = []
    monkeypatch.setattr(host_files, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or host)
    export(model, tmp_path / "served", host="somebody/llava", revision="abc")
    served = Served.of(json.loads((tmp_path / "served" / "config.json").read_text()))
    assert (served.host, served.revision) == ("somebody/llava", "abc")
    assert asked[0][1]["revision"] == "abc"
    repository = ["model.safetensors", "config.json", "original/params.json", "original/consolidated.00.pth"]
    assert list(filter_repo_objects(repository, ignore_patterns=asked[0][1]["ignore_patterns"])) == ["config.json"]
    card = (tmp_path / "served" / "README.md").read_text()
    assert "vllm serve <this directory or repository>\n```" in card
    assert "The host's weights are not here. vLLM reads them from somebody/llava, revision abc." in card
    assert [path.name for path in (tmp_path / "served").glob("*.safetensors*")] == [WEIGHTS]
    assert AutoProcessor.from_pretrained(tmp_path / "served")
    export(model, tmp_path / "copied", host="somebody/llava", copy=True)
    assert Served.of(json.loads((tmp_path / "copied" / "config.json").read_text())).host is None
    assert (tmp_path / "copied" / "model.safetensors").is_file()
    assert list(filter_repo_objects(repository, ignore_patterns=asked[1][1]["ignore_patterns"])) == repository[:2]


def test_the_revision_of_a_host(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision that the adapters name is used only for the host that they name."""
    save_adapters(host, tmp_path / "adapter", "default")
    config = tmp_path / "adapter" / "adapter_config.json"
    values = {"base_model_name_or_path": "somebody/llava", "revision": "abc"}
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    asked: list[tuple[str, str | None]] = []

    class Config:
        @staticmethod
        def from_pretrained(name: str, revision: str | None = None) -> Any:
            asked.append((name, revision))
            return AutoConfig.from_pretrained(host)

    monkeypatch.setitem(load_for_export.__globals__, "AutoConfig", Config)
    adapters = {"default": str(tmp_path / "adapter")}
    for given in ((), (None, "def"), (str(host),), ("somebody/llava", "def")):
        where = load_for_export(adapters, *given)[1]
        assert (where["host"], where["revision"]) == asked[-1]
    expected = [("somebody/llava", "abc"), ("somebody/llava", "def"), (str(host), None), ("somebody/llava", "def")]
    assert asked == expected
    save_adapters(host, tmp_path / "other", "default")
    with pytest.raises(ValueError, match=r"are for several hosts \(name, revision\), .*'abc'.*Write --model"):
        load_for_export({**adapters, "other": str(tmp_path / "other")})


@pytest.mark.parametrize("active", ["both", "images"])
def test_one_of_several_adapters_is_written_whichever_is_active(host: Path, active: str, tmp_path: Path) -> None:
    model = save_adapters(host, tmp_path / "adapter", "both", branches=["text", "vision"])
    model.add_adapter("images", CromeConfig(bottleneck_dim=4, branches=["vision"]))
    randomize(model, "images", 1)
    model.set_adapter(active)
    before, text = snapshot(model), {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    for name in ("both", "images"):
        export(model, tmp_path / name, adapters=[name])
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        with adapter_of(model, name):
            torch.testing.assert_close(logits(stock, text), logits(model, text))
        assert Served.of(stock.config).adapters.keys() == {name}
    assert_equal(snapshot(model), before)


@contextmanager
def adapter_of(model: PeftModel, name: str) -> Iterator[None]:
    """Make an adapter active while the block runs."""
    before = model.active_adapter
    model.set_adapter(name)
    yield
    model.set_adapter(before)


def test_a_text_branch_is_folded(host: Path, tmp_path: Path) -> None:
    both = {"branches": ["text", "vision"]}
    model = save_adapters(host, tmp_path / "adapter", "default", **both)
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    expected = logits(model, text)
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "served"), "--model", str(host)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "with the text branch in its embedding table" in (tmp_path / "served" / "README.md").read_text()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "served").eval()
    torch.testing.assert_close(logits(stock, text), expected)
    assert {key.split(".")[1] for key in matrices(tmp_path / "served", "default")} == {
        "crome_up", "crome_gate_vision", "crome_down_vision"
    }  # fmt: skip
    save_adapters(host, tmp_path, "one", "two", **both)
    arguments = ["export", str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "new"), "--model", str(host)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "has a text branch, which is folded into the host's embedding table, so an engine serves one such" in (
        result.output
    )


def test_a_model_in_memory(tmp_path: Path) -> None:
    case = ZOO["llava"]()
    model, batch = attach(case.model, branches=["vision"]).eval(), case.batch
    randomize(model)
    expected = logits(model, batch)
    before = snapshot(model)
    export(model, tmp_path / "served")
    assert not changed(model, before)
    with model.disable_adapter():
        frozen = logits(model, batch)
    assert_equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "served").eval(), batch), frozen)
    assert_equal(logits(model, batch), expected)


def test_a_composite_is_written_whole(tmp_path: Path) -> None:
    model = attach(build(), branches=["vision"])
    randomize(model)
    host = model.eval().get_base_model()
    host.config.text_model_name_or_path = "somebody/language"
    export(model, tmp_path / "served")
    assert host.config.text_model_name_or_path == "somebody/language"
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == ["CromeCromeVLMForConditionalGeneration"]
    assert config["text_config"]["architectures"] == [type(host.language_model).__name__]
    assert config["text_model_name_or_path"] is None
    stock = type(host).from_pretrained(tmp_path / "served").eval()
    batch = make_batch(host)
    with model.disable_adapter():
        assert_equal(logits(stock, batch), logits(model, batch))
    with pytest.raises(ValueError, match="A composite is written from memory, so it has no files to copy"):
        export(model, tmp_path / "new", host=tmp_path / "served")
    for other in (qformer_composite(), build(language="t5")):
        with pytest.raises(ValueError, match="vLLM does not serve a composite with"):
            export(attach(other), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_refused(host: Path, tmp_path: Path) -> None:
    model = save_adapters(host, tmp_path / "adapter", "default")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="is there already; nothing was written"):
        export(model, tmp_path / "there")
    words = attach(ZOO["llava"]().model, branches=["text"])
    with pytest.raises(ValueError, match=r"has no branch that reads images\. Write fold"):
        export(words, tmp_path / "new")
    reserved = attach(ZOO["llava"]().model, "__base__", branches=["vision"])
    with pytest.raises(ValueError, match="'__base__' is a request's name for the host alone"):
        export(reserved, tmp_path / "new")
    other = ZOO["gemma3"]().model.config
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"it has model_type 'gemma3' and not 'llava'\. Name the directory"):
        export(model, tmp_path / "new", host=tmp_path / "other")
    wide = AutoConfig.from_pretrained(host)
    wide.text_config.num_hidden_layers += 1
    wide.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"it has num_hidden_layers 3 and not 2\. Name the directory"):
        export(model, tmp_path / "new", host=tmp_path / "other")
    (host / "model.safetensors").rename(host / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no safetensors files\. Write them"):
        export(model, tmp_path / "new", host=host)
    for arguments, message in {
        ("a/x", "b/x", "new"): "Got 'x' twice; expected a name of its own",
        ("v1.0=a", "b", "new"): "Got the name 'v1.0'; expected a name of its own, without a dot",
        ("runs/rate=0.1", "b", "new"): "Got the name 'rate=0.1'; expected a name of its own, without a dot",
    }.items():
        result = CliRunner().invoke(app, ["export", *arguments])
        assert result.exit_code == 1
        assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "host", "other", "there"]
