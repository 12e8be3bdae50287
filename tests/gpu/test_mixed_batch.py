"""Test `adapter_names` on a GPU. Each row has the result of its adapter alone, and more adapters add no waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.test_mixed_batch import (  # noqa: F401
    test_composite_generates,
    test_generate,
    test_several_images_in_a_row,
)
from tests.tuner.helpers import BOTH, logits
from tests.tuner.test_slots import KINDS, names, rows_of, with_adapters
from tests.zoo.case import moved
from tests.zoo.llava import llava

pytestmark = pytest.mark.gpu
ROWS = 64


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect the operations in which the CPU waits for the GPU. The list is filled when the block ends."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


def counted(run: Callable[[], object]) -> int:
    run()  # what is made at the first call
    with waits() as found:
        run()
    return len(found)


def test_waits_are_counted() -> None:
    value = torch.ones(3, device="cuda")
    assert counted(lambda: value.sum().item()) == 1
    assert counted(lambda: value.sum()) == 0


def test_many_adapters_wait_no_more_than_few() -> None:
    model = with_adapters(KINDS["equal"], ROWS).to("cuda")
    inputs = moved(rows_of(llava().generate_inputs(), ROWS), "cuda")

    def prompt(count: int) -> int:
        return counted(lambda: logits(model, {**inputs, "adapter_names": names(count)}))

    assert prompt(64) == prompt(16) == prompt(4)

    def tokens(**extra: object) -> int:
        settings = {"do_sample": False, "pad_token_id": 0}
        short, long = (
            counted(lambda length=length: model.generate(
                **inputs, **extra, **settings, max_new_tokens=length, min_new_tokens=length
            ))
            for length in (3, 6)
        )  # fmt: skip
        return long - short

    with model.disable_adapter():
        base = tokens()
    assert tokens(adapter_names=names(64)) == tokens(adapter_names=names(1)) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_each_adapter_alone(dtype: torch.dtype) -> None:
    model = with_adapters([{"branches": BOTH}], 6).to("cuda", dtype)
    batch = moved(rows_of(llava().batch, 8), "cuda")
    batch["pixel_values"] = torch.randn_like(batch["pixel_values"]).to(dtype)
    rows = ["5", "0", "__base__", "2", "0", "0", "1", "4"]
    mixed = logits(model, {**batch, "adapter_names": rows})
    bounds = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, batch)[row]
        else:
            model.set_adapter(name)
            expected = logits(model, batch)[row]
        torch.testing.assert_close(mixed[row], expected, **bounds)
