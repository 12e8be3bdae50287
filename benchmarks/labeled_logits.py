"""Measure a training step with logits at labels, against logits everywhere and TRL's fused output head.

    python -m benchmarks.labeled_logits

Two rows of 512 tokens, a tenth of which have labels, in bfloat16. The floor is the same as in `benchmarks.step_time`:
the frozen model's forward and backward pass, with all of its logits. Times are taken in one process, in turn, and
memory in a fresh process per way. Needs Linux.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from benchmarks.devices import SPEED, Device, clock_on, in_fresh_process, results_on
from benchmarks.interleaved import machine, markdown, middle, publish, ratios, seconds_in_turn
from benchmarks.memory import GIVE_BACK
from benchmarks.methods import CROME, FLOOR, attach, backbone, base_of, batch_of, training_step
from benchmarks.step_memory import peak_of
from examples.easy_vqa.parts import gemma3_270m, smollm2
from examples.easy_vqa.records import write_json
from peft_crome import logits_at_labels

ROWS, TOKENS, SHARE = 2, 512, 0.1
LANGUAGES: dict[str, Callable[[], Path]] = {"SmolLM2-135M": smollm2, "Gemma 3 270M": gemma3_270m}
EVERYWHERE, AT_LABELS, TRL = "CROME, all logits", "CROME, logits at labels", "CROME, TRL's fused head"


def composite_of(language: str, device: str = "cpu") -> nn.Module:
    """Build frozen DINOv2-small and the language model in bfloat16."""
    return backbone(language=LANGUAGES[language](), dtype=torch.bfloat16, device=device)


def model_of(composite: nn.Module, way: str) -> nn.Module:
    """Prepare the composite for training in this way."""
    if way == TRL:
        add_fused_lm_head(composite)
    return attach(composite, FLOOR if way == FLOOR else CROME)


def step_of(model: nn.Module, way: str, tokens: int = TOKENS) -> Callable[[], None]:
    """Return a function that runs one step; the last tenth of each row's tokens has labels."""
    batch = batch_of(base_of(model), ROWS, tokens, labeled=SHARE)
    if way == AT_LABELS:
        return training_step(model, batch, logits_at_labels)
    return training_step(model, batch | ({"fused_lm_head": True} if way == TRL else {}))


def measure(
    language: str,
    repeats: int,
    clock: str = "perf_counter",
    make: Callable[[str], nn.Module] = composite_of,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure the seconds of each way's step, one value per repeat.

    Args:
        clock: function of the module `time`; "perf_counter" waits for a GPU.
        make: function that builds the frozen composite on the device; tests pass a tiny one.
    """
    ways = {}
    for way in (FLOOR, EVERYWHERE, AT_LABELS, TRL):
        torch.manual_seed(0)
        ways[way] = step_of(model_of(make(language), way), way, tokens)
    timer = clock_on(device) if clock == "perf_counter" else getattr(time, clock)
    seconds = seconds_in_turn(ways, repeats, timer)
    return {
        "language": language,
        "clock": clock,
        "seconds": seconds,
        "machine": machine(device),
        "load": os.getloadavg(),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Format a line per language model and way."""
    rows = []
    for record in records:
        seconds, peaks = record["seconds"], record["peaks"]
        for way, taken in seconds.items():
            time, memory = ("1", "1") if way == FLOOR else (
                middle(ratios(taken, seconds[FLOOR])), f"{peaks[way] / peaks[FLOOR]:.3f}"
            )  # fmt: skip
            rows.append([record["language"], way, middle(taken, 2), time, f"{peaks[way] / 1e6:,.0f}", memory])
    header = ["frozen in bfloat16", "way", "a step, s", "to the floor", "peak, MB", "to the floor"]
    return markdown(header, rows)


def main(
    repeats: Annotated[int, typer.Option(help="Number of steps of each way.")] = 9,
    cpu_time: Annotated[bool, typer.Option(help="Exclude other processes' time. Use one thread.")] = False,
    case: Annotated[str | None, typer.Option(help="Measure the memory of this language model and way (JSON).")] = None,
    device: Device = "cpu",
) -> None:
    """Measure, write and print. Numbers are medians with the middle half."""
    if case is not None:
        language, way = json.loads(case)
        make = partial(composite_of, device=device)
        found = peak_of(lambda: model_of(make(language), way), lambda model: step_of(model, way), device)
        print(json.dumps(found))
        return
    results = results_on(device, SPEED)
    records = []
    clock = "process_time" if cpu_time else "perf_counter"
    for language in LANGUAGES:
        record = measure(language, repeats, clock, partial(composite_of, device=device), device=device)
        Console(stderr=True).print(f"{language}: {record['seconds']}", markup=False)
        record["peaks"] = {}
        for way in record["seconds"]:
            arguments = ["--device", device, "--case", json.dumps([language, way])]
            found = in_fresh_process("benchmarks.labeled_logits", *arguments, **GIVE_BACK)
            record["peaks"][way] = found["peak"]
            Console(stderr=True).print(f"{language}, {way}: {record['peaks'][way] / 1e6:,.0f} MB", markup=False)
        records.append(record)
        write_json(results / "labeled_logits.json", records)  # a shared machine may take hours
    publish(results / "labeled_logits", records, table(records))


if __name__ == "__main__":
    typer.run(main)
