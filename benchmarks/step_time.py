"""Measure a training step of each method against the frozen model alone.

    python -m benchmarks.step_time

Frozen DINOv2-small and SmolLM2-135M. The floor is the least that a method on the input needs: forward, and backward to
the embeddings. All methods train in one process, a step of each in turn, on the same image and words.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.devices import SPEED, Device, clock_on, results_on
from benchmarks.interleaved import machine, markdown, middle, plot_ratios, publish, ratios, seconds_in_turn
from benchmarks.methods import CONFIGS, CROME, FLOOR, attach, backbone, batch_of, training_step

GOAL = 1.02
# Each case: language model in nf4, rows, tokens, compiled, methods.
CASES: list[dict[str, Any]] = [
    {"nf4": False, "rows": 2, "tokens": 512, "compiled": False, "methods": list(CONFIGS)},
    {"nf4": False, "rows": 1, "tokens": 1024, "compiled": False, "methods": list(CONFIGS)},
    {"nf4": True, "rows": 2, "tokens": 512, "compiled": False, "methods": list(CONFIGS)},
    {"nf4": False, "rows": 2, "tokens": 512, "compiled": True, "methods": [FLOOR, CROME]},
]


def measure(case: dict[str, Any], repeats: int, make: Any = backbone, device: str = "cpu") -> dict[str, Any]:
    """Measure the seconds of each method's step, one value per repeat.

    Args:
        make: function that builds the frozen composite on the device; tests pass a tiny one.
        device: device of the steps.
    """
    ways, trained = {}, {}
    for method in case["methods"]:
        torch.manual_seed(0)
        model = attach(make(case["nf4"]), method)
        trained[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        composite = model if method == FLOOR else model.get_base_model()
        batch = batch_of(composite, case["rows"], case["tokens"], prompt="prompt" in method)
        if case["compiled"]:
            composite.language_model.forward = torch.compile(composite.language_model.forward)
        ways[method] = training_step(model, batch)
    seconds = seconds_in_turn(ways, repeats, clock_on(device))
    dtype = str(composite.dtype).removeprefix("torch.")
    return {"case": case, "trained": trained, "seconds": seconds, "dtype": dtype, "machine": machine(device)}


def title(record: dict[str, Any]) -> str:
    """Describe a case in words."""
    case = record["case"]
    frozen, compiled = "nf4, " if case["nf4"] else "", ", torch.compile" if case["compiled"] else ""
    return f"{frozen}{record['dtype']}, {case['rows']} x {case['tokens']} tokens{compiled}"


def to_floor(record: dict[str, Any]) -> dict[str, list[float]]:
    """Compute each method's ratios to the floor."""
    seconds = record["seconds"]
    return {name: ratios(seconds[name], seconds[FLOOR]) for name in seconds if name != FLOOR}


def table(records: list[dict[str, Any]]) -> str:
    """Format a line per case and method."""
    rows = []
    for record in records:
        found = to_floor(record)
        for name, seconds in record["seconds"].items():
            ratio = middle(found[name]) if name in found else "1"
            rows.append([title(record), name, f"{record['trained'][name]:,}", middle(seconds), ratio])
    return markdown(["frozen in", "method", "weights that train", "a step, s", "to the frozen model alone"], rows)


def main(repeats: Annotated[int, typer.Option(help="Steps of each method.")] = 15, device: Device = "cpu") -> None:
    """Measure, write and print. Numbers are medians with the middle half."""
    results = results_on(device, SPEED)
    records = []
    for case in CASES:
        Console(stderr=True).print(str(case), markup=False)
        records.append(measure(case, repeats, partial(backbone, device=device), device))
    publish(results / "step_time", records, table(records))
    panels = {title(record): to_floor(record) for record in records}
    plot_ratios(panels, results / "step_time.png", "time of a training step / frozen model alone")


if __name__ == "__main__":
    sys.exit(typer.run(main))
