"""Print what `peft-crome train` reports before the first step."""

from __future__ import annotations

from typing import Any

from ..training.recipe.schema import Recipe
from ..training.stages import STAGES
from .app import console, print_table

GB = 1e9


def announce(recipe: Recipe, report: Any) -> None:
    """Print a pre-flight report: parts, memory, time, rows that are cut. Warnings are logged where they arise."""
    count = "streamed rows" if report.rows is None else f"{report.rows:,} rows"
    say(f"{recipe.stage} on {count}, to {STAGES[recipe.stage].purpose}:")
    print_parts(report.trained, report.cost)
    if report.cost is not None:
        say(
            f"memory: {report.cost.peak / GB:.2f} GB predicted for {report.size.rows} rows of {report.size.tokens} "
            f"tokens, of {report.device.memory / GB:.1f} GB on {report.device.name}"
        )
    if report.seconds is not None:
        low, high = report.seconds
        say(f"time: {low:.2g} to {high:.2g} s a step, an estimate from how fast this device multiplies")
    if report.padding is not None and report.padding.random:
        found = report.padding
        grouped = "" if report.rows is None else f"{found.grouped:.0%} with training.group_by_length, "
        say(f"padding: {found.random:.0%} of the tokens in random batches of {report.size.rows} rows, {grouped}"
            f"{found.packed:.0%} with training.packing")  # fmt: skip
    sample = report.sample
    if sample.max_length is not None:
        share = sample.cut / len(sample.lengths)
        say(f"rows: {share:.1%} of {len(sample.lengths)} looked at are cut at {sample.max_length} tokens; "
            f"the longest has {max(sample.lengths)}")  # fmt: skip


def print_parts(trained: dict[str, int], cost: Any) -> None:
    """Print a table of the model's parts: trained weights, and the memory of all weights."""
    sizes = cost.weights if cost is not None else {}
    rows = []
    for part in dict.fromkeys([*sizes, *trained]):
        size = f"{sizes[part] / GB:.3f}" if part in sizes else ""
        rows.append((part, f"{trained[part]:,}" if part in trained else "frozen", size))
    if cost is not None:
        rows.append(("AdamW's states", "", f"{cost.optimizer / GB:.3f}"))
        rows.append(("activations and gradients", "", f"{cost.activations / GB:.3f}"))
    print_table(("part", "weights that train", "GB"), rows)


def say(line: str) -> None:
    """Print one line without line breaks, so that it can be searched."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
