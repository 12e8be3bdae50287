"""Test the loss on plain text with and without an adapter: hosts, composites, other methods and the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from peft_crome import CromeConfig
from peft_crome.cli import app
from peft_crome.evaluation import adapters_off, text_loss
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.vlm.tiny import build, make_tokenizer

WORDS = " ".join(f"w{number * 7 % 90}" for number in range(230))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=16, pad_token_id=0, **sizes))


def with_values(model: Any, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("crome_", "lora_", "ia3_", "prompt")):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def test_equals_the_cross_entropy_worked_out_chunk_by_chunk() -> None:
    model, words = llama(), make_tokenizer()
    found = text_loss(model.train(), words, WORDS, chunk_tokens=100, batch_size=2, progress=False)
    ids = torch.tensor(words.convert_tokens_to_ids(words.tokenize(WORDS)))
    start = [words.bos_token_id] if words("w1").input_ids[0] == words.bos_token_id else []
    sums, counts = [], []
    for chunk in ids.split(100):
        row = torch.tensor([*start, *chunk.tolist()])
        with torch.no_grad():
            logits = model.eval()(row[None]).logits[0, :-1]
        sums.append(float(F.cross_entropy(logits, row[1:], reduction="sum")))
        counts.append(len(row) - 1)
    assert (found.tokens, found.chunks) == (sum(counts), 3)
    assert found.adapted == found.base == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert found.cost == found.cost_stderr == 0
    means = torch.tensor([total / count for total, count in zip(sums, counts, strict=True)])
    assert 0 < found.base_stderr < 3 * means.std()


def test_a_start_token_is_where_the_tokenizer_puts_it() -> None:
    """A start token stands where the tokenizer puts it, and it is not predicted."""
    with_start = make_tokenizer()
    with_start.bos_token = "w1"
    with_start.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A", special_tokens=[("w1", with_start.bos_token_id)]
    )
    ids = with_start(WORDS, return_tensors="pt").input_ids
    assert ids[0, 0] == with_start.bos_token_id
    model = llama()
    with torch.no_grad():
        expected = model.eval()(ids, labels=ids).loss.item()
    found = text_loss(model, with_start, WORDS, progress=False)
    assert found.base == pytest.approx(expected, rel=1e-5)
    assert math.isnan(found.base_stderr)


METHODS = {
    "vision": CromeConfig(branches=["vision"], init_weights=False),
    "text": CromeConfig(branches=["text"], init_weights=False),
    "lora": LoraConfig(target_modules=r".*language_model.*q_proj"),
}


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_a_composite(method: str, language: str) -> None:
    config = METHODS[method]
    if (method, language) == ("lora", "t5"):
        config = LoraConfig(target_modules=r".*language_model.*\.q")
    base = text_loss(build(language=language).eval(), make_tokenizer(), WORDS, chunk_tokens=60, progress=False)
    model = with_values(get_peft_model(build(language=language), config), 10.0).train()
    trains = [parameter.requires_grad for parameter in model.parameters()]
    found = text_loss(model, make_tokenizer(), WORDS, chunk_tokens=60, progress=False)
    assert found.base == pytest.approx(base.base, rel=1e-5)
    assert (found.cost == 0) == (method == "vision")
    assert found.cost == pytest.approx(found.adapted - found.base, abs=1e-9)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


@pytest.mark.parametrize(
    "config", [IA3Config(target_modules=["k_proj"], feedforward_modules=[]), PromptTuningConfig(num_virtual_tokens=3)]
)
def test_other_methods_on_a_language_model(config: Any) -> None:
    config.task_type = "CAUSAL_LM"
    model = with_values(get_peft_model(llama(), config))
    found = text_loss(model, make_tokenizer(), WORDS, chunk_tokens=100, progress=False)
    assert found.base == pytest.approx(text_loss(llama(), make_tokenizer(), WORDS, chunk_tokens=100).base, rel=1e-5)
    assert found.cost != 0
    assert found.tokens == text_loss(llama(), make_tokenizer(), WORDS, chunk_tokens=100).tokens


def test_adapters_that_transformers_attached_are_turned_off_and_on() -> None:
    model = build()
    model.add_adapter(CromeConfig(branches=["text"], init_weights=False), adapter_name="default")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        on = with_values(model).eval()(input_ids=ids).logits
        with adapters_off(model):
            off = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, on)
    assert torch.equal(off, build().eval()(input_ids=ids).logits)


@pytest.mark.parametrize("text", ["", "w1"])
def test_a_text_that_is_too_short(text: str) -> None:
    with pytest.raises(ValueError, match=r"The text has \d tokens, and a loss takes two"):
        text_loss(llama(), make_tokenizer(), text)


PROSE = "What color is the circle? red " * 40
TO_A_FILE = ["{}/adapter", "--text", "{}/prose.txt", "--text", "{}/more.txt", "--output", "{}/loss.json"]


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    """Write a host, an adapter and two texts, and return the adapted model."""
    save_tokenizer_and_model(tmp_path / "host")
    host = AutoModelForImageTextToText.from_pretrained(tmp_path / "host")
    model = with_values(get_peft_model(host, CromeConfig(bottleneck_dim=8)))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "prose.txt").write_text(PROSE)
    (tmp_path / "more.txt").write_text("USER: yes no " * 9)
    return model


def evaluate(arguments: list[str], tmp_path: Path) -> Any:
    return CliRunner().invoke(app, ["evaluate", *(argument.format(tmp_path) for argument in arguments)])


def test_command_line_on_an_adapter_of_a_host(on_disk: Any, tmp_path: Path) -> None:
    result = evaluate(TO_A_FILE, tmp_path)
    assert result.exit_code == 0, result.output
    expected = text_loss(on_disk, AutoTokenizer.from_pretrained(tmp_path / "host"), PROSE, progress=False)
    written = json.loads((tmp_path / "loss.json").read_text())["text_loss"][str(tmp_path / "prose.txt")]
    assert written["adapted"] == written["base"] == pytest.approx(expected.base, rel=1e-5)
    assert written["tokens"] == expected.tokens
    assert f"{expected.base:.4f}" in result.stdout
    assert "0.0000" in result.stdout


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TO_A_FILE, "loss.json exists already"),
        (["{}/adapter", "rows.json", "--text", "{}/prose.txt"], "expected one of them"),
        (["{}/adapter"], "DATA is missing"),
        (["{}/adapter", "--text", "{}/none.txt"], "none.txt"),
    ],
    ids=["file that is there", "data set and text", "neither", "no text"],
)
def test_command_line_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "loss.json").write_text("{}")
    result = evaluate(arguments, tmp_path)
    assert result.exit_code == 1
    assert message in result.stderr
