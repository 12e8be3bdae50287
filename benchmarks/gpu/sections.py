"""Measure on a GPU: a training step, decoding, and a batch of many adapters. Each gives a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import decoding, many_adapters
from benchmarks.devices import clock_on, held, peak, settle
from benchmarks.gpu.hosts import DTYPE, SHAPES, Hosts, compile_layers, share
from benchmarks.interleaved import seconds_in_turn
from benchmarks.methods import CROME, FLOOR, attach, base_of, batch_of, training_step
from peft_crome import logits_at_labels

LABELED = 0.1  # share of a row's tokens
MOST_LORAS = 64  # PEFT takes longer to add each one than the one before
AT_LABELS = "logits at labels"
LORAS = ("LoRA r=8 on q, v", "LoRA r=16 on all linear layers")
# Name of a way -> the method, and whether it computes logits only where there are labels.
STEPS: dict[str, tuple[str, bool]] = {
    FLOOR: (FLOOR, False),
    CROME: (CROME, False),
    f"{CROME}, {AT_LABELS}": (CROME, True),
    **{lora: (lora, False) for lora in LORAS},
    f"{LORAS[1]}, {AT_LABELS}": (LORAS[1], True),
}
COMPILED_STEPS = list(STEPS)[:3]
COMPILED_DECODING = (decoding.BASE, decoding.UNFOLDED)


@dataclass(frozen=True)
class Section:
    """One part of a table, measured separately.

    Args:
        kind: "step", "decoding" or "many_adapters".
        size: a key of `SHAPES`.
        frozen: "bf16" or "nf4".
        compiled: each layer by `torch.compile` in training; a static cache and CUDA graphs in decoding.
        share: share of the time, relative to other sections.
        least: smallest number of seconds left to start it.
    """

    kind: str
    size: str
    frozen: str = "bf16"
    compiled: bool = False
    share: float = 1.0
    least: float = 10.0


# Ordered so that a run that is cut short has the most important results.
KINDS: list[dict[str, Any]] = [
    {"kind": "step"},
    {"kind": "decoding"},
    {"kind": "many_adapters", "share": 2.0},
    {"kind": "step", "frozen": "nf4"},
    {"kind": "step", "compiled": True, "least": 40.0},
    {"kind": "decoding", "frozen": "nf4"},
    {"kind": "decoding", "compiled": True, "share": 2.0, "least": 90.0},
]


def plan(sizes: list[str]) -> list[Section]:
    """List the sections of some sizes."""
    sections = [Section(size=size, **kind) for kind in KINDS for size in sizes]
    return [
        replace(section, share=section.share * SHAPES[section.size].share)
        for section in sections
        if section.frozen in SHAPES[section.size].frozen
    ]


def measure(section: Section, hosts: Hosts, until: float) -> dict[str, Any]:
    """Measure a section and return its record, with the seconds of each way.

    Args:
        until: `time.perf_counter()` at which it should be finished.
    """
    torch.compiler.reset()  # the compiler sees each model of a section as a new one
    return MEASURES[section.kind](section, hosts, until)


def step(section: Section, hosts: Hosts, until: float) -> dict[str, Any]:
    """Measure the seconds of a training step of each way in turn, and the device's peak memory with each way alone."""
    shape, host, device = SHAPES[section.size], hosts.get(section.size, section.frozen), hosts.device
    ways: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int | None] = {}
    trained: dict[str, int] = {}
    alone = held(device)
    for way in COMPILED_STEPS if section.compiled else STEPS:
        settle(device)
        others = held(device) - alone  # memory of the ways before
        try:
            ways[way], trained[way] = _ready_step(section, host, way)
            for _ in range(2):  # AdamW has its states in the second step
                ways[way]()
            peaks[way] = peak(device) - others
        except torch.OutOfMemoryError:
            peaks[way] = None
            ways.pop(way, None)
    seconds = {way: [] for way in peaks} | seconds_in_turn(ways, shape.repeats, clock_on(device), until)
    work = {"rows": shape.rows, "tokens": shape.tokens, "labeled": LABELED}
    return {**work, "seconds": seconds, "peaks": peaks, "trained": trained}


def _ready_step(section: Section, host: Any, way: str) -> tuple[Callable[[], None], int]:
    """Return a function that runs a step as `Trainer` with `bf16=True` does, and the number of trained weights."""
    torch.manual_seed(0)
    shape, (method, at_labels) = SHAPES[section.size], STEPS[way]
    own = share(host)
    model = attach(compile_layers(own) if section.compiled else own, method)
    batch = batch_of(base_of(model), shape.rows, shape.tokens, labeled=LABELED)
    model.forward = torch.autocast(batch["input_ids"].device.type, dtype=DTYPE)(model.forward)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (training_step(model, batch, logits_at_labels) if at_labels else training_step(model, batch)), trained


def decode(section: Section, hosts: Hosts, until: float) -> dict[str, Any]:
    """Measure the seconds per token of each way, in turn."""
    shape, host = SHAPES[section.size], hosts.get(section.size, section.frozen)
    options: dict[str, Any] = {"names": (decoding.BASE, decoding.FOLDED, decoding.UNFOLDED, *LORAS)}
    if section.compiled:
        options = {"names": COMPILED_DECODING, "cache_implementation": "static"}  # `generate` compiles this on a GPU
    return decoding.measure(shape.repeats, shape.decoded, shape.prompt, partial(share, host), until=until, **options)


def many(section: Section, hosts: Hosts, until: float) -> dict[str, Any]:
    """Measure the seconds of a batch with one adapter and with many, in turn."""
    shape = SHAPES[section.size]
    host = hosts.get(section.size, section.frozen, shape.small_image)
    return many_adapters.measure(
        shape.batch, list(shape.adapters), shape.repeats, shape.read, shape.more, partial(share, host),
        hosts.device, until, most_loras=MOST_LORAS,
    )  # fmt: skip


MEASURES: dict[str, Callable[[Section, Hosts, float], dict[str, Any]]] = {
    "step": step,
    "decoding": decode,
    "many_adapters": many,
}
