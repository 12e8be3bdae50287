"""Ratios of times on a machine that is never quiet: one process, everything in turn, medians."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch


def machine() -> dict[str, object]:
    """What a number was measured on: processor, threads, PyTorch's release and the instructions that it uses."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": found[1] if found else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def seconds_in_turn(
    ways: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` of them. A repeat has all ways and begins with another one; the first is lost.

    Args:
        clock: `time.process_time` leaves out what other processes take, and counts each thread's seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats + 1):
        turn = repeat % len(names)
        for name in [*names[turn:], *names[:turn]]:
            start = clock()
            ways[name]()
            if repeat:
                taken[name].append(clock() - start)
    return taken


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Repeat by repeat, so that what else the machine did then falls on both."""
    return [value / other for value, other in zip(values, base, strict=True)]


def middle(values: Sequence[float], digits: int = 3) -> str:
    """Median and middle half, as a table has them."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def markdown(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def plot_ratios(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, label: str) -> None:
    """A panel per case: each way's ratio, its median and its middle half.

    Args:
        panels: case -> way -> ratios.
        label: of the axis.
    """
    height = 0.5 + sum(0.5 + 0.32 * len(ways) for ways in panels.values())
    sizes = [len(ways) for ways in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7.5, height), sharex=True, squeeze=False, height_ratios=sizes, layout="constrained"
    )
    for (case, ways), axis in zip(panels.items(), axes[:, 0], strict=True):
        for place, (name, values) in enumerate(ways.items()):
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
    temporary = path.with_name(f"tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
