"""What was trained in which stage, as a Markdown table for a model card."""

from __future__ import annotations

from typing import Any


def stage_table(record: dict[str, Any]) -> list[str]:
    """A row for each of the record's "stages"; lines."""
    lines = [
        "| stage | trained weights | data (rows) | rows per step | steps | learning rate | final loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in record["stages"]:
        trained = "<br>".join(f"{part}: {count:,}" for part, count in stage["trained"].items())
        data = "<br>".join(f"{item['path']} ({_rows(item['rows'])})" for item in stage["data"])
        training = stage["recipe"]["training"]
        loss = "-" if stage["losses"] == [] else f"{stage['losses'][-1][1]:.4f}"
        peak = f"{training['initial_learning_rate']:g} to {training['learning_rate']:g}"
        peak += "".join(f"<br>{part}: {value:g}" for part, value in training["learning_rates"].items())
        rate = f"{peak} in {training['warmup_steps']} steps, cosine to 0"
        cells = [stage["stage"], trained, data, training["batch_size"], stage["steps"], rate, loss]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _rows(count: int | None) -> str:
    return "streamed" if count is None else f"{count:,}"


STAGE_RECORD = "crome_stage.json"  # of a directory that a training stage wrote, which has an adapter
