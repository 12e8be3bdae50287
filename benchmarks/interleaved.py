"""Measure ratios of times on a machine that is never idle: one process, all ways in turn, medians."""

from __future__ import annotations

import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from benchmarks.devices import is_gpu
from examples.easy_vqa.records import write_json

T = TypeVar("T")
LEAST = 2  # number of repeats: one has no spread
OUT_OF_MEMORY = "out of memory"


def machine(device: str = "cpu") -> dict[str, object]:
    """Describe the machine of a measurement: processor, the instructions that PyTorch uses, threads, PyTorch, GPU."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts: dict[str, object] = {
        "processor": found[1] if found else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if is_gpu(device):
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory": gpu.total_memory, "cuda": torch.version.cuda}
    return facts


def in_turn(ways: Mapping[str, Callable[[], T]], repeats: int, until: float = math.inf) -> dict[str, list[T]]:
    """Return the results of each way, `repeats` times. Repeats have all ways in rotating order; the first is dropped.

    A way that does not fit into a GPU's memory is left out from then on, and its list is empty.

    Args:
        until: `time.perf_counter()` at which the repeats should be finished. At least two are made.
    """
    results: dict[str, list[T]] = {name: [] for name in ways}
    left = list(ways)
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        turn = repeat % max(1, len(left))
        for name in [*left[turn:], *left[:turn]]:
            try:
                result = ways[name]()
            except torch.OutOfMemoryError:
                left.remove(name)
                results[name] = []
            else:
                if repeat:
                    results[name].append(result)
            if name not in left:  # the error, which kept the way's memory, is gone only now
                torch.cuda.empty_cache()
        now = time.perf_counter()
        if repeat >= LEAST and now + (now - start) > until:
            break
    return results


def seconds_in_turn(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    until: float = math.inf,
) -> dict[str, list[float]]:
    """Measure the seconds of each way, in the order of `in_turn`.

    Args:
        clock: `time.process_time` excludes other processes and adds up the seconds of all threads.
            `devices.clock_on` waits for a GPU.
        until: as in `in_turn`.
    """

    def timed(way: Callable[[], object]) -> float:
        start = clock()
        way()
        return clock() - start

    return in_turn({name: partial(timed, way) for name, way in ways.items()}, repeats, until)


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Compute ratios repeat by repeat, so that other work affects both sides; empty if one side is empty."""
    if not values or not base:
        return []
    return [value / other for value, other in zip(values, base, strict=True)]


def middle(values: Sequence[float], digits: int = 3) -> str:
    """Format median and middle half for a table. A way without values did not fit into memory."""
    if not values:
        return OUT_OF_MEMORY
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def markdown(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def publish(file: Path, record: object, table: str) -> None:
    """Write a record and its table, and print the table.

    Args:
        file: path of both without a suffix.
    """
    write_json(file.with_suffix(".json"), record)
    file.with_suffix(".md").write_text(table)
    print(table)


def plot_ratios(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, label: str) -> None:
    """Plot a panel per case: each way's ratio, its median and its middle half.

    Args:
        panels: case -> way -> ratios.
        label: label of the axis.
    """
    height = 0.5 + sum(0.5 + 0.32 * len(ways) for ways in panels.values())
    sizes = [len(ways) for ways in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7.5, height), sharex=True, squeeze=False, height_ratios=sizes, layout="constrained"
    )
    for (case, ways), axis in zip(panels.items(), axes[:, 0], strict=True):
        for place, (name, values) in enumerate(ways.items()):
            if not values:
                continue
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            color = "C1" if name.startswith("CROME") else "C0"
            spread = [[median - low], [high - median]]
            axis.errorbar(median, place, xerr=spread, fmt="o", color=color, capsize=3)
        axis.set_yticks(range(len(ways)), list(ways), fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_title(case, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel(label)
    save_plot(figure, path)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot as a whole or not at all, and close it."""
    temporary = path.with_name(f"tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
