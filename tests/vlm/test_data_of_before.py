"""Test that older directories still load and give the same logits. They were saved before the composite had `model`,
its part without the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor
from tests.vlm.data_of_before.make import batch

BEFORE = Path(__file__).parent / "data_of_before"
EXPECTED = load_file(BEFORE / "expected.safetensors")
COMPOSITES = ("composite", "composite_qformer")


def keys(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def assert_answers(model: Any, name: str) -> None:
    host = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch(host)).logits, EXPECTED[name])


@pytest.mark.parametrize("name", COMPOSITES)
def test_composite_loads_and_is_saved_with_the_same_keys(name: str, tmp_path: Path) -> None:
    model = CromeVLMForConditionalGeneration.from_pretrained(BEFORE / name)
    assert_answers(model, name)
    model.save_pretrained(tmp_path)
    assert keys(tmp_path / "model.safetensors") == keys(BEFORE / name / "model.safetensors")


@pytest.mark.parametrize("name", COMPOSITES)
def test_adapter_with_trained_projections_loads_and_is_saved_with_the_same_keys(name: str, tmp_path: Path) -> None:
    adapter = BEFORE / f"adapter_of_{name}"
    host = CromeVLMForConditionalGeneration.from_pretrained(BEFORE / name)
    model = PeftModel.from_pretrained(host, str(adapter))
    assert_answers(model, adapter.name)
    model.save_pretrained(tmp_path)
    found = keys(tmp_path / "adapter_model.safetensors")
    assert found == keys(adapter / "adapter_model.safetensors")
    assert "base_model.model.image_projection.weight" in found


def test_stage_loads_whole_and_in_parts() -> None:
    training = pytest.importorskip("peft_crome.training", exc_type=ImportError)
    training.read_record(BEFORE / "stage")  # no file is missing or of another size
    assert_answers(CromeVLMForConditionalGeneration.from_pretrained(BEFORE / "stage"), "stage")
    alone = CromeVLMForConditionalGeneration.from_pretrained(BEFORE / "stage", adapter="ignore")
    assert_answers(PeftModel.from_pretrained(alone, str(BEFORE / "stage")), "stage")
    assert CromeVLMProcessor.from_pretrained(BEFORE / "stage").image_token_id == 13
