"""Test the ablation at a small size: each kind of variant trains the declared weights, and the report is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from benchmarks import ablation
from benchmarks.variants import EQUAL, INITIALIZATIONS, OWN_UP, VARIANTS, Bottleneck, by_hooks, table_rms
from examples.easy_vqa import quickstart
from examples.easy_vqa.model import frozen_dtype
from peft_crome import CromeConfig
from tests.vlm.tiny import build, make_batch

BY_NAME = {variant.name: variant for variant in VARIANTS}


def test_bottleneck_of_the_ablation_is_the_packages_adapter() -> None:
    """With its gate and one shared W_u, the ablation's bottleneck computes the same as the package's adapter. So a
    part that is left out of it is left out of the method."""
    model, batch = build(), None
    batch = make_batch(model)
    adapted = get_peft_model(build(), CromeConfig(branches=["text", "vision"], bottleneck_dim=8, init_weights=False))
    weights = adapted.get_base_model().crome
    text, vision = (Bottleneck(32, 8, table_rms(model)) for _ in range(2))
    vision.up = text.up
    with torch.no_grad():
        text.up.weight.copy_(weights.crome_up["default"].weight)
        for branch, own in (("text", text), ("vision", vision)):
            own.gate.weight.copy_(getattr(weights, f"crome_gate_{branch}")["default"].weight)
            own.down.weight.copy_(getattr(weights, f"crome_down_{branch}")["default"].weight)
        hooked = by_hooks(text, vision, model)
        torch.testing.assert_close(hooked(**batch).logits, adapted(**batch).logits)


@pytest.mark.parametrize("count", [3 * 576 * EQUAL, 6 * 576 * OWN_UP], ids=["EQUAL", "OWN_UP"])
def test_sizes_are_equal_where_they_can_be(count: int) -> None:
    default = 5 * 576 * 256
    assert count == pytest.approx(default, rel=0.002)


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_initializations_give_what_they_say(name: str) -> None:
    read = 5 * torch.randn(500, 32) @ torch.diag(torch.linspace(0.1, 2, 32))
    weight = INITIALIZATIONS[name](read, torch.empty(16, 32))
    assert torch.isfinite(weight).all()
    hidden = (read - read.mean(0)) @ weight.T
    if name == "principal":
        torch.testing.assert_close(hidden.std(0, correction=0), torch.ones(16), rtol=1e-3, atol=1e-3)
    if name == "per branch":
        assert hidden.std().item() == pytest.approx(1, rel=0.5)


def test_every_run_has_a_file_of_its_own() -> None:
    files = [ablation.file_of(variant, seed) for variant, seed in ablation.plan()]
    assert len(set(files)) == len(files) == 10 * 3 + 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_call_goes_on_in_the_dtype_of_the_records(dtype: str, tmp_path: Path) -> None:
    assert ablation.dtype_of_all(tmp_path) == frozen_dtype()
    (tmp_path / "crome-seed0.json").write_text(json.dumps({"dtype": dtype}))
    assert ablation.dtype_of_all(tmp_path) == getattr(torch, dtype)


def test_records_in_two_dtypes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "crome-seed0.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (tmp_path / "ia3-seed1.json").write_text(json.dumps({"dtype": "float32"}))
    with pytest.raises(ValueError, match="bfloat16 and float32, whose rows do not compare"):
        ablation.dtype_of_all(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("CROME", 737_280),
        ("CROME without the gate", 3 * 576 * EQUAL),
        ("CROME, text branch alone", 3 * 576 * EQUAL),
        ("projection alone", 221_760),
        ("prompt tuning", 15 * 576),
        ("IA3", 30 * (192 + 192 + 1536)),
    ],
)
def test_variant_trains_what_it_says(name: str, trained: int, tmp_path: Path) -> None:
    align = replace(quickstart.ALIGN, steps=2, images_per_step=2)
    finetune = replace(quickstart.FINETUNE, steps=2, images_per_step=2)
    variant = BY_NAME[name]
    record = ablation.run_one(variant, 0, torch.float32, align, finetune, {"what": 4, "yes/no": 4})
    assert record["dtype"] == "float32"
    assert record["finetune"]["trained_parameters"] == trained
    projection = 0 if name == "projection alone" else 221_760
    assert record["align"]["trained_parameters"] == trained + projection
    assert record["score"]["what"]["n"] == 4
    ablation.write_json(ablation.file_of(variant, 0, tmp_path), record)
    ablation.write_report(tmp_path)
    assert f"| {name} | 1 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "accuracy_over_weights.png").stat().st_size > 5_000
    stored = json.loads(ablation.file_of(variant, 0, tmp_path).read_text())
    assert stored["score"] == record["score"]
