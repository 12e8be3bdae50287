"""Measure the memory of a training step of each method against the frozen model alone.

    python -m benchmarks.step_memory

Each method runs in a fresh process, measured as in `benchmarks.memory`. CROME's goal is the memory of its weights,
gradients and AdamW states, 5·d·m·(4+4+8) bytes, plus 5% of the floor. Needs Linux.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.devices import SPEED, Device, in_fresh_process, peak, results_on
from benchmarks.interleaved import markdown, publish
from benchmarks.memory import GIVE_BACK, load
from benchmarks.methods import CONFIGS, CROME, FLOOR, attach, backbone, base_of, batch_of, training_step

CASES = [{"nf4": nf4, "rows": 2, "tokens": 512} for nf4 in (False, True)]
ALLOWED = 1.05


def measure(case: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Measure the highest memory of two steps of a method; call it in a fresh process."""

    def step(model: torch.nn.Module) -> Callable[[], None]:
        batch = batch_of(base_of(model), case["rows"], case["tokens"], "prompt" in case["method"])
        return training_step(model, batch)

    return peak_of(lambda: attach(backbone(case["nf4"], device=device), case["method"]), step, device)


def peak_of(
    make: Callable[[], torch.nn.Module],
    step_of: Callable[[torch.nn.Module], Callable[[], None]],
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure the highest memory of two steps, minus the process's memory before the model; in a fresh process.

    Args:
        make: function that makes the model.
        step_of: function that makes a function for one step of the model.
        device: device whose memory counts.
    """
    import bitsandbytes  # noqa: F401

    model, before = load(make, device)
    step = step_of(model)
    for _ in range(2):
        step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(base_of(model).dtype).removeprefix("torch.")
    return {"peak": peak(device) - before, "trained": trained, "dtype": dtype}


def goal(records: list[dict[str, Any]]) -> float:
    """Return the bytes that CROME may use in this case."""
    floor, crome = (next(r for r in records if r["method"] == name) for name in (FLOOR, CROME))
    return floor["peak"] * ALLOWED + crome["trained"] * (4 + 4 + 8)


def table(records: list[dict[str, Any]]) -> str:
    """Format a line per case and method."""
    rows = []
    for nf4 in dict.fromkeys(record["nf4"] for record in records):
        chosen = [record for record in records if record["nf4"] == nf4]
        frozen = ("nf4, " if nf4 else "") + chosen[0]["dtype"]
        floor = next(record["peak"] for record in chosen if record["method"] == FLOOR)
        for record in chosen:
            allowed = f"{goal(chosen) / 1e6:,.0f}" if record["method"] == CROME else ""
            cells = [
                f"{record['trained']:,}",
                f"{record['peak'] / 1e6:,.0f}",
                f"{record['peak'] / floor:.3f}",
                allowed,
            ]
            rows.append([f"{frozen}, {record['rows']} x {record['tokens']} tokens", record["method"], *cells])
    header = ["frozen in", "method", "weights that train", "peak, MB", "to the frozen model alone", "goal, MB"]
    return markdown(header, rows)


def main(
    case: Annotated[str | None, typer.Option(help="Measure only this case (JSON).")] = None,
    device: Device = "cpu",
) -> None:
    """Measure each method in a separate process, write and print."""
    if case is not None:
        print(json.dumps(measure(json.loads(case), device)))
        return
    results = results_on(device, SPEED)
    records = []
    for chosen in [{**case, "method": method} for case in CASES for method in CONFIGS]:
        arguments = ["--device", device, "--case", json.dumps(chosen)]
        records.append({**chosen, **in_fresh_process("benchmarks.step_memory", *arguments, **GIVE_BACK)})
        Console(stderr=True).print(f"{chosen}: {records[-1]['peak'] / 1e6:,.0f} MB", markup=False)
    publish(results / "step_memory", records, table(records))


if __name__ == "__main__":
    typer.run(main)
