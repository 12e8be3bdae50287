"""Test the benchmarks of speed at a tiny size. Each measures what it claims, and results that should be equal are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import decoding, labeled_logits, many_adapters, operations, own_work, step_memory, step_time
from benchmarks.interleaved import middle, plot_ratios, ratios, seconds_in_turn
from benchmarks.methods import CONFIGS, CROME, FLOOR, attach, batch_of, training_step
from tests.vlm.tiny import build


def tiny(nf4: bool = False) -> Any:
    return build().bfloat16()


def test_repeats_have_all_ways_in_turn() -> None:
    called: list[str] = []
    taken = seconds_in_turn({name: lambda name=name: called.append(name) for name in "abc"}, 2)
    assert "".join(called) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in taken.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_of_one_repeat() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert middle([1.0, 2.0, 3.0], 1) == "2.0 (1.5 to 2.5)"


@pytest.mark.parametrize("method", CONFIGS)
def test_methods_train_what_they_say(method: str) -> None:
    model = attach(tiny(), method)
    composite = model if method == FLOOR else model.get_base_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step = training_step(model, batch_of(composite, 2, 32, prompt="prompt" in method))
    step()
    step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert bool(changed) == (method != FLOOR)


def test_floor_goes_back_to_the_embeddings() -> None:
    model = attach(tiny(), FLOOR)
    seen = []
    for site in (model.get_input_embeddings(), model.vision_fusion):
        site.register_forward_hook(lambda module, inputs, output: seen.append(output))
    training_step(model, batch_of(model, 2, 32))()
    assert len(seen) == 2
    assert all(output.grad is not None and output.grad.abs().sum() > 0 for output in seen)


def test_own_work_is_a_step_of_the_adapter() -> None:
    """The measured step trains all of the adapter's weights and no others."""
    model = attach(tiny(), CROME)
    batch = batch_of(model.get_base_model(), 2, 32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    own = own_work.own_step(model, batch)
    own()
    own()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    record = own_work.measure({"nf4": False, "rows": 1, "tokens": 32, "compiled": False}, 2, tiny)
    assert len(own_work.table([record]).splitlines()) == 2 + 1


def test_step_time_writes_a_line_per_method(tmp_path: Path) -> None:
    case = {"nf4": False, "rows": 1, "tokens": 32, "compiled": False, "methods": [FLOOR, CROME]}
    record = step_time.measure(case, 2, tiny)
    lines = step_time.table([record]).splitlines()
    assert len(lines) == 2 + 2
    assert record["trained"][CROME] == 5 * 32 * 256
    plot_ratios({"tiny": step_time.to_floor(record)}, tmp_path / "plot.png", "ratio")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.width > 100


def test_labeled_logits_write_a_line_per_way() -> None:
    record = labeled_logits.measure("SmolLM2-135M", 2, make=lambda language: tiny(), tokens=40)
    assert list(record["seconds"]) == [
        FLOOR, labeled_logits.EVERYWHERE, labeled_logits.AT_LABELS, labeled_logits.TRL,
    ]  # fmt: skip
    record["peaks"] = dict.fromkeys(record["seconds"], 2_000_000)
    assert len(labeled_logits.table([record]).splitlines()) == 2 + 4


def test_labeled_logits_have_one_loss() -> None:
    """All ways to compute logits have the loss of the floor, the frozen model, because they use the same labels."""
    losses = {}
    for way in (FLOOR, labeled_logits.EVERYWHERE, labeled_logits.AT_LABELS, labeled_logits.TRL):
        torch.manual_seed(0)
        model = labeled_logits.model_of(build(), way)
        seen: list[torch.Tensor] = []
        model.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output.loss)  # type: ignore[misc]
        )
        step = labeled_logits.step_of(model, way, 40)
        step()
        losses[way] = seen[-1].detach()
    for way, loss in losses.items():
        torch.testing.assert_close(loss, losses[FLOOR], msg=lambda text, way=way: f"{way}: {text}")


def test_memory_goal_is_the_issues() -> None:
    records = [{"method": FLOOR, "peak": 1_000_000}, {"method": CROME, "trained": 1000}]
    assert step_memory.goal(records) == 1_050_000 + 16_000  # type: ignore[arg-type]


def test_folded_adapter_decodes_the_same_tokens() -> None:
    record = decoding.measure(2, 6, 32, tiny)
    assert record["folded_says_the_same"]
    assert set(decoding.to_base(record)) == set(record["seconds"]) - {decoding.BASE}
    assert len(decoding.table(record).splitlines()) == 2 + len(record["seconds"])


def test_many_adapters_are_measured_in_each_way() -> None:
    record = many_adapters.measure(4, [1, 4], 2, 32, 2, tiny)
    assert list(record["seconds"]["decoding"]) == [
        "no adapter",
        *[f"{name}, {how}" for name in ("CROME", "LoRA r=8 on q, v")
          for how in ("the active one", "1 of adapter_names", "4 of adapter_names")],
    ]  # fmt: skip
    assert len(many_adapters.table(record).splitlines()) == 2 + 7


@pytest.mark.parametrize("method", operations.CONFIGS)
def test_each_operation_can_be_repeated(method: str, tmp_path: Path) -> None:
    ways = operations.operations(method, tmp_path, tiny)
    assert tuple(ways) == operations.OPERATIONS
    for call in [*ways.values(), *ways.values()]:
        call()


def test_thousand_adapters_weigh_what_their_weights_do() -> None:
    found = operations.thousand(40, tiny)
    assert found["weights"] == 40 * 5 * 32 * 256 * 4
    assert found["grown"] / found["weights"] == pytest.approx(1, abs=0.5)
