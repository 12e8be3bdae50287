"""Test the keys of a recipe for half precision, accumulation and checkpointing. Each trains with losses near those of
float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_crome.training import load_recipe, train
from tests.training.tiny import weights


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": {"bf16": True}},
        {"arguments": {"fp16": True}},
        {"gradient_checkpointing": True},
        {"rows_per_device": 1},
        {"rows_per_device": 2, "gradient_checkpointing": True, "arguments": {"bf16": True}},
    ],
    ids=lambda changes: (
        "-".join(changes.get("arguments", {})) + "-".join(key for key in changes if key != "arguments")
    ),
)
def test_each_key_trains(changes: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    plain = [loss for _, loss in train(load_recipe(values))["stages"][-1]["losses"]]
    values["output"] = str(tmp_path / "changed")
    arguments = {"disable_tqdm": True, **changes.get("arguments", {})}
    values["training"] |= {**changes, "arguments": arguments}
    losses = [loss for _, loss in train(load_recipe(values))["stages"][-1]["losses"]]
    assert losses == pytest.approx(plain, rel=0.02)
    assert losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in weights(tmp_path / "changed").values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_parts_in_half_precision(dtype: str, values: dict[str, Any]) -> None:
    """With frozen parts in half precision, as is the default of `backbones.dtype`, what trains is still float32."""
    values["backbones"]["dtype"] = dtype
    record = train(load_recipe(values))["stages"][-1]
    assert record["losses"][-1][1] < record["losses"][0][1]
    stored = {key: value.dtype for key, value in weights(Path(values["output"])).items()}
    assert {dtype for key, dtype in stored.items() if not key.startswith("qformer.")} == {torch.float32}, stored
