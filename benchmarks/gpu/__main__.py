"""Measure speed and memory on a GPU, against PEFT's LoRA, in a budget of eight minutes.

    python -m benchmarks.gpu --device cuda                  # the shapes of LLaVA-1.5-7B and of a 0.5B for small cards
    python -m benchmarks.gpu --device cuda --size 0.5b      # one of them
    python -m benchmarks.gpu --report                       # the tables of docs/speed.md from existing results
    python -m benchmarks.gpu --device cpu --size tiny       # the same code in seconds, without a GPU

Weights are random and created on the device, so nothing is downloaded. Each section's record is written when it ends.
A section that fails, does not fit into memory or has no time left is recorded as such, and the next one begins.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.devices import Device, is_gpu
from benchmarks.gpu.hosts import SHAPES, Hosts
from benchmarks.gpu.page import tables, write_page
from benchmarks.gpu.sections import Section, measure, plan
from benchmarks.interleaved import OUT_OF_MEMORY, machine
from examples.easy_vqa.records import write_json

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
MINUTES = 8.0  # imports come before it, and the last section may end a little late
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def run(sections: list[Section], device: str, minutes: float, file: Path) -> dict[str, Any]:
    """Measure the sections, and write the record after each of them."""
    start = time.perf_counter()
    deadline = start + 60 * minutes
    hosts = Hosts(device)
    record: dict[str, Any] = {"machine": machine(device), "sections": []}
    for number, section in enumerate(sections):
        now = time.perf_counter()
        share = section.share / sum(later.share for later in sections[number:])
        found = {**asdict(section), **_attempt(section, hosts, now, now + (deadline - now) * share, deadline)}
        found["took"] = round(time.perf_counter() - now, 1)
        record["sections"].append(found)
        record["minutes"] = round((time.perf_counter() - start) / 60, 2)
        write_json(file, record)
        done = (
            f"{number + 1} of {len(sections)}, {found['took']:.0f} s: {section.kind} {section.size} {section.frozen}"
        )
        console.print(f"{done}{' compiled' * section.compiled}, {found.get('left_out', 'measured')}")
    return record


def _attempt(section: Section, hosts: Hosts, now: float, until: float, deadline: float) -> dict[str, Any]:
    """Return the measurements of a section, or the reason under "left_out" why there are none."""
    if deadline - now < section.least:
        return {"left_out": "no time was left"}
    try:
        return measure(section, hosts, until)
    except torch.OutOfMemoryError:
        return {"left_out": OUT_OF_MEMORY}
    except Exception as error:  # a GPU may be available only once, so keep the other sections
        traceback.print_exc()
        return {"left_out": f"{type(error).__name__}: {error}", "failed": True}


def _check(device: str) -> None:
    try:
        is_gpu(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def main(
    device: Device = "cuda",
    size: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SHAPES)}. Default: 7b and 0.5b.")] = None,
    minutes: Annotated[float, typer.Option(help="Minutes for all sections together.")] = MINUTES,
    results: Annotated[Path, typer.Option(help="Folder of the record, cuda.json or cpu.json.")] = RESULTS,
    report: Annotated[bool, typer.Option("--report", help="Only write the page from the record.")] = False,
) -> None:
    """Measure, write and print. Exits with status 1 if a section failed."""
    sizes = size or ["7b", "0.5b"]
    if unknown := [name for name in sizes if name not in SHAPES]:
        raise typer.BadParameter(f"--size {unknown[0]} is unknown. Write one of {', '.join(SHAPES)}.")
    file = results / f"{torch.device(device).type}.json"
    if not report:
        _check(device)
    record = json.loads(file.read_text()) if report else run(plan(sizes), device, minutes, file)
    print(tables(record))
    if results.resolve() == RESULTS.resolve() and file.name == "cuda.json":
        write_page(record)
    sys.exit(any(section.get("failed") for section in record["sections"]))


if __name__ == "__main__":
    typer.run(main)
