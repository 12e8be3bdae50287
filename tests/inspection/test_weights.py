"""Test the inspection of an adapter's files against numbers computed by hand, and its errors for wrong files."""

import json
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from peft_crome import CromeConfig
from peft_crome.inspection import inspect_adapter
from tests.tuner.helpers import M, adapted, attach
from tests.zoo import ZOO


def write(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    settings = {"bottleneck_dim": 2, "base_model_name_or_path": "some/base"} | config
    CromeConfig(**settings).save_pretrained(str(folder))
    tensors = {f"base_model.model.crome.crome_{name}.weight": value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def by_hand() -> dict[str, torch.Tensor]:
    """Return weights of width 3 with two hidden units in each branch. The second unit has no W_g in the vision branch,
    and a negligible W_d in the text branch."""
    return {
        "up": torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]),  # (d, m): W_u transposed
        "gate_text": torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
        "down_text": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1e-5]]),
        "gate_vision": torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        "down_vision": torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]),
    }


def test_numbers_are_those_of_a_hand_computation(tmp_path: Path) -> None:
    report = inspect_adapter(write(tmp_path, by_hand()))
    assert (report.hidden_size, report.bottleneck_dim, report.dtype) == (3, 2, "float32")
    assert (report.parameters, report.other_parameters) == (5 * 3 * 2, 0)
    assert (report.base_model, report.is_identity) == ("some/base", False)
    torch.testing.assert_close(report.up.singular_values, torch.tensor([4.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(report.up.unit_norms, torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert report.up.effective_rank == pytest.approx(exp(-4 / 7 * log(4 / 7) - 3 / 7 * log(3 / 7)))
    text, vision = report.branches
    assert (text.branch, vision.branch) == ("text", "vision")
    assert text.dead_units == (1,)
    assert vision.dead_units == (1,)
    assert vision.down.effective_rank == pytest.approx(1.0)
    assert vision.parameters == 2 * 3 * 2


def test_sigmoid_of_zero_opens_a_unit(tmp_path: Path) -> None:
    text, vision = inspect_adapter(write(tmp_path, by_hand(), gate_activation="sigmoid")).branches
    assert text.dead_units == (1,)  # its W_d is dead, whatever the gate
    assert vision.dead_units == ()


def test_row_of_the_shared_matrix_kills_a_unit_of_every_branch(tmp_path: Path) -> None:
    weights = by_hand()
    weights["up"][:, 0] = 0
    report = inspect_adapter(write(tmp_path, weights))
    assert [branch.dead_units for branch in report.branches] == [(0, 1), (0, 1)]


def test_fresh_adapter_is_an_identity_with_every_unit_dead(tmp_path: Path) -> None:
    attach(ZOO["llava"]().model).save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert report.is_identity
    assert report.up.effective_rank == 0
    assert report.model_type == "llava"
    assert all(len(branch.dead_units) == M for branch in report.branches)


def test_bf16_weights_and_what_is_stored_beside_them(tmp_path: Path) -> None:
    model = adapted(ZOO["llava"](), modules_to_save=["multi_modal_projector"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    projector = model.base_model.model.model.multi_modal_projector.get_base_layer().original_module
    assert report.dtype == "bfloat16"
    assert report.other_parameters == sum(parameter.numel() for parameter in projector.parameters())
    assert not report.is_identity


def test_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder, and the Hub does not give it"):
        inspect_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json\. Give the directory of an adapter"):
        inspect_adapter(tmp_path)
    adapter = write(tmp_path / "adapter", by_hand())
    with pytest.raises(ValueError, match=r"has no adapter_config\.json\. Give .*adapter\."):
        inspect_adapter(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        inspect_adapter(adapter / "adapter_config.json")


def test_adapter_of_another_method(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    get_peft_model(ZOO["llava"]().model, lora).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter of the method LORA; peft-crome looks into those of CROME"):
        inspect_adapter(tmp_path)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    weights = by_hand()
    del weights["down_text"]
    with pytest.raises(ValueError, match=r"missing keys \['crome_down_text\.weight'\]"):
        inspect_adapter(write(tmp_path / "part", weights))
    weights = by_hand()
    weights["up"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite, in .*crome_up\.weight"):
        inspect_adapter(write(tmp_path / "nan", weights))
    config = write(tmp_path / "config", by_hand())
    (config / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="and no weights"):
        inspect_adapter(config)
    other = write(tmp_path / "other", by_hand())
    values = json.loads((other / "adapter_config.json").read_text()) | {"bottleneck_dim": 7}
    (other / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="this model needs"):
        inspect_adapter(other)
