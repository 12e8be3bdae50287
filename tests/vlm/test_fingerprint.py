"""Test that changed weights are detected from samples of their values."""

import pytest
import torch

from peft_crome.vlm.fingerprint import changed, take_samples

SMALL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool, torch.float4_e2m1fn_x2]


def matrices() -> dict[str, torch.Tensor]:
    return {"wide": torch.randn(3, 50), "tall": torch.randn(50, 3), "experts": torch.randn(2, 5, 7)}


def test_a_rounding_is_a_change_and_a_cast_is_none() -> None:
    weights = matrices()
    samples = take_samples(weights)
    assert changed(weights, samples) == set()
    assert changed({key: value.clone().half().float() for key, value in weights.items()}, samples)
    assert changed({key: value.half() for key, value in weights.items()}, samples) == set(), "a cast is no change"


@pytest.mark.parametrize("dimension", [-2, -1], ids=["rows", "columns"])
@pytest.mark.parametrize("key", ["wide", "tall", "experts"])
def test_each_row_and_each_column_is_looked_at(key: str, dimension: int) -> None:
    weights = matrices()
    samples = take_samples(weights)
    for number in range(weights[key].shape[dimension]):
        other = weights[key].clone()
        other.select(dimension, number).add_(1.0)
        assert changed({**weights, key: other}, samples) == {key}


def test_shapes_and_biases() -> None:
    weights = {"bias": torch.zeros(4096), "empty": torch.zeros(0, 5), "number": torch.tensor(3.0)}
    samples = take_samples(weights)
    assert changed(weights, samples) == set()
    other = weights["bias"].clone()
    other[17] = 1.0
    assert changed({**weights, "bias": other, "number": torch.tensor(4.0)}, samples) == {"bias", "number"}
    assert changed({"bias": torch.zeros(4097)}, samples) == {"bias"}


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("shape", [(6, 8), (48, 1)])
def test_types_of_one_byte(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = torch.randint(0, 2, shape, dtype=torch.uint8)
    samples = take_samples({"weight": values.view(dtype)})
    assert changed({"weight": values.clone().view(dtype)}, samples) == set()
    values[3] = 1 - values[3]
    assert changed({"weight": values.view(dtype)}, samples) == {"weight"}
