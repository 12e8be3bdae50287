"""Test that `peft-crome plan` makes its tables from configurations alone, and test its error messages."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from peft_crome import CromeConfig
from peft_crome.cli import app
from peft_crome.training import load_recipe, train
from tests.vlm.tiny import text_config, vision_config

runner = CliRunner()


@pytest.fixture
def configs(tmp_path: Path) -> tuple[str, str]:
    """Return the directories of a tower and a language model. Each holds only a `config.json`."""
    vision_config("dinov2").save_pretrained(tmp_path / "tower")
    text_config("llama").save_pretrained(tmp_path / "llm")
    return str(tmp_path / "tower"), str(tmp_path / "llm")


def plan(*arguments: str) -> Any:
    return runner.invoke(app, ["plan", *arguments])


def test_plan_from_two_configurations(configs: tuple[str, str]) -> None:
    result = plan(
        "--backbone", configs[1], "--vision", configs[0], "--gpu", "t4", "--dtype", "float16", "--rows", "5000"
    )
    assert result.exit_code == 0, result.output
    for text in ("language_model", "vision_tower", "image_projection", "adapter", "AdamW's states", "T4 (16 GB)"):
        assert text in result.stdout
    assert "9 of them an image's" in result.stdout
    assert "5,000" in result.stdout
    assert "40% of the data sheet's dense rate in float16" in result.stdout
    small = plan("--backbone", configs[1], "--vision", configs[0], "--qformer", "--stage", "instruct", "--gpu", "3gb")
    assert small.exit_code == 0, small.output
    assert "qformer" in small.stdout
    assert "so no times are given" in small.stdout


def test_plan_from_what_finetune_takes(tmp_path: Path) -> None:
    """`plan` gives the same tables for a model and for an adapter of it. Both have only their configuration."""
    config = LlavaConfig(vision_config=CLIPVisionConfig(hidden_size=24), text_config=LlamaConfig(hidden_size=32))
    config.save_pretrained(tmp_path / "llava")
    CromeConfig(base_model_name_or_path=str(tmp_path / "llava"), bottleneck_dim=8).save_pretrained(
        tmp_path / "adapter"
    )
    plans = [plan(str(tmp_path / name), "--gpu", "t4") for name in ("llava", "adapter")]
    assert [result.exit_code for result in plans] == [0, 0], [result.output for result in plans]
    assert plans[0].stdout == plans[1].stdout
    assert "rows of 128 tokens" in plans[0].stdout
    refused = plan(str(tmp_path / "llava"), "--quantization", "4bit")
    assert "--set model.quantization=4bit" in refused.stderr
    settings = ("--set", "model.quantization=4bit", "--set", "training.max_steps=9")
    quantized = plan(str(tmp_path / "llava"), *settings, "--gpu", "t4")
    assert quantized.exit_code == 0, quantized.output
    assert quantized.stdout != plans[0].stdout


def test_plan_from_a_recipe_and_a_stage(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = plan(str(tmp_path / "recipe.yaml"), "--set", "backbones.quantization=4bit", "--gpu", "rtx3090")
    assert result.exit_code == 0, result.output
    assert "text_projection" in result.stdout
    later = ["finetune", "--set", f"previous={values['output']}", "--gpu", "l40s"]
    result = plan(*later)
    assert result.exit_code == 1
    assert "does not exist yet" in result.stderr
    train(load_recipe(values))
    monkeypatch.setenv("HOME", str(Path(values["output"]).parent))
    result = plan("finetune", "--set", f"previous=~/{Path(values['output']).name}")
    assert result.exit_code == 0, result.output
    result = plan(*later)
    assert result.exit_code == 0, result.output
    assert "adapter" in result.stdout


@pytest.mark.parametrize(
    ("name", "quantization"), [("llava", []), ("qwen2", ["--quantization", "8bit"])], ids=["llava", "qwen2"]
)
def test_plan_of_a_model_that_sees_and_of_a_language_model(name: str, quantization: list[str], tmp_path: Path) -> None:
    language = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    language |= {"vocab_size": 100, "pad_token_id": 0}
    llava = LlavaConfig(vision_config=vision_config(), text_config=LlamaConfig(**language), image_token_index=99)
    llava.save_pretrained(tmp_path / "llava")
    text_config("qwen2").save_pretrained(tmp_path / "qwen2")
    result = plan("--backbone", str(tmp_path / name), *quantization, "--length", "40", "--gpu", "24gb")
    assert result.exit_code == 0, result.output
    assert "rows of 40 tokens." in result.stdout


def test_batches_stop_at_the_first_that_does_not_fit(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    result = plan("--backbone", str(tmp_path), "--length", "2048", "--gpu", "8gb")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("│") and ("yes" in line or "no " in line)]
    assert " no " in lines[-1]
    assert all(" yes " in line for line in lines[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "LLM", "--gpu", "h10"], "known are h100, a100-80"),
        ([], "Name a recipe, a model, or two to join: peft-crome plan --backbone NAME --vision NAME"),
        (["pretrain", "--backbone", "LLM"], "A recipe names its own model. Change its keys: --set"),
        (["--backbone", "LLM", "--qformer"], "are for a tower. Name it: --vision NAME"),
        (["--backbone", "nobody/nothing"], "model: 'nobody/nothing' cannot be loaded"),
        (["nobody/nothing"], "model: 'nobody/nothing' cannot be loaded"),
        (["--backbone", "LLM", "--vision", "nobody/nothing"], "backbones.vision: 'nobody/nothing' cannot be loaded"),
        (["--backbone", "TOWER"], "is not a language model"),
        (["--backbone", "LLM", "--vision", "TOWER", "--length", "9"], "an image alone takes 9 tokens"),
        (["nowhere.yaml"], "neither a file nor a preset"),
    ],
)
def test_plan_says_what_is_wrong(arguments: list[str], message: str, configs: tuple[str, str]) -> None:
    places = {"TOWER": configs[0], "LLM": configs[1]}
    result = plan(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
