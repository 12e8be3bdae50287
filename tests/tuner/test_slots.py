"""Test that many adapters in one batch launch as many kernels as a few. Embeddings are sorted into slots, and weights
are stacked once, with one product for each map."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from peft_crome import CromeConfig
from peft_crome.tuner.mixed_batch.slots import Slots
from tests.tuner.helpers import BOTH, M, a_token, assert_equal, attach, crome_weight, kernels, logits, randomize
from tests.zoo import Batch
from tests.zoo.llava import llava

ROWS = 64
KINDS: dict[str, list[dict[str, Any]]] = {
    "equal": [{"branches": BOTH}],
    "other widths": [{"branches": BOTH, "bottleneck_dim": m} for m in (M, 2, 7)],
    "other activations": [{"branches": BOTH}, {"branches": BOTH, "gate_activation": "sigmoid"}],
    "other branches": [{"branches": BOTH}, {"branches": ["text"]}, {"branches": ["vision"]}],
}


def rows_of(batch: Batch, rows: int) -> Batch:
    return {key: value[:1].repeat(rows, *[1] * (value.dim() - 1)) for key, value in batch.items()}


def with_adapters(kinds: list[dict[str, Any]], count: int) -> PeftModel:
    """Build a model in eval mode with adapters "0", "1", ... of these kinds in turn."""
    model = attach(llava().model, "0", **kinds[0])
    for number in range(1, count):
        model.add_adapter(str(number), CromeConfig(**{"bottleneck_dim": M, **kinds[number % len(kinds)]}))
    for number in range(count):
        randomize(model, str(number), seed=number)
    return model.eval()


def names(count: int) -> list[str]:
    return [str(row % count) for row in range(ROWS)]


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_and_syncs_do_not_grow_with_the_adapters(kind: str) -> None:
    model = with_adapters(KINDS[kind], ROWS)
    inputs = rows_of(llava().generate_inputs(), ROWS)
    few = max(4, len(KINDS[kind]) * 2)  # of each kind more than one
    tokens, prompts = {}, {}
    for count in (1, few, 16, 64):
        tokens[count] = a_token(model, {**inputs, "adapter_names": names(count)})
        prompts[count] = kernels(lambda count=count: model(**inputs, adapter_names=names(count)))
    for counted in (tokens, prompts):
        assert counted[64] == counted[16] == counted[few]
        assert counted[1].total() <= counted[few].total()
    assert not any(key.startswith(("aten.stack", "aten.cat")) for key in tokens[64] - tokens[1])
    with model.disable_adapter():
        base = a_token(model, inputs)
    assert syncs(tokens[64]) == syncs(base)
    if kind == "equal":
        assert tokens[64] == tokens[1]
        assert (tokens[64].total() - base.total()) / 3 <= 15


def syncs(counted: Counter[str]) -> dict[str, int]:
    return {key: number for key, number in counted.items() if key.startswith("sync")}


def test_names_add_nothing_to_a_token_by_default() -> None:
    model = with_adapters([{"branches": None}], ROWS)
    inputs = rows_of(llava().generate_inputs(), ROWS)
    with model.disable_adapter():
        base = a_token(model, inputs)
    assert a_token(model, {**inputs, "adapter_names": names(ROWS)}) == base


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_each_adapter_alone(kind: str) -> None:
    case = llava()
    model = with_adapters(KINDS[kind], 6)
    batch = rows_of(case.batch, 8)
    batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    rows = ["5", "0", "__base__", "2", "0", "0", "1", "4"]
    mixed = logits(model, {**batch, "adapter_names": rows})
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                assert_equal(mixed[row], logits(model, batch)[row])
        else:
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], logits(model, batch)[row], rtol=1e-5, atol=1e-5)


def test_gradients_reach_each_row_s_adapter() -> None:
    case = llava()
    model = with_adapters(KINDS["other widths"], 3)
    batch = rows_of(case.batch, 4)
    rows = ["2", "0", "1", "0"]
    weights = {
        (number, kind): crome_weight(model, kind, str(number)).requires_grad_()
        for number in range(3)
        for kind in ("up", "gate_text", "down_vision")
    }
    model(**batch, adapter_names=rows).logits[:, -1].square().sum().backward()
    found = {key: weight.grad for key, weight in weights.items()}
    for number in range(3):
        model.zero_grad()
        model.set_adapter(str(number))
        for (other, _), weight in weights.items():
            weight.requires_grad_(other == number)
        (model(**batch).logits[:, -1].square().sum() * rows.count(str(number)) / 4).backward()
        for kind in ("up", "gate_text", "down_vision"):
            gradient = weights[number, kind].grad
            assert gradient is not None
            assert gradient.any()
            torch.testing.assert_close(found[number, kind], gradient, rtol=1e-3, atol=1e-4)


def test_adapters_that_accelerate_has_offloaded() -> None:
    model = with_adapters(KINDS["equal"], 2)
    batch = {**llava().batch, "adapter_names": ["1", "0"]}
    expected = logits(model, batch)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert crome_weight(model, "up", "0").is_meta
    assert_equal(logits(model, batch), expected)


@settings(max_examples=100, deadline=None)
@given(owners=st.lists(st.integers(-1, 6), min_size=1, max_size=60), group=st.sets(st.integers(0, 6), min_size=1))
def test_slots_hold_each_embedding_once(owners: list[int], group: set[int]) -> None:
    slots = Slots.of(torch.tensor(owners), {number: str(number) for number in group}, torch.device("cpu"))
    expected = [index for index, owner in enumerate(owners) if owner in group]
    if slots is None:
        assert not expected
        return
    assert sorted(slots.mine.tolist()) == expected
    room = slots.source.shape[1]
    assert len(set(slots.place.tolist())) == len(expected)
    for embedding, place in zip(slots.mine.tolist(), slots.place.tolist(), strict=True):
        assert slots.source.flatten()[place] == embedding
        assert slots.names[place // room] == str(owners[embedding])
    present = {owner for owner in owners if owner in group}
    assert len(slots.names) < 2 * len(present) or len(slots.names) == len(present) == 1
    assert len(slots.names) * room <= 2 * (len(expected) + len(present))
