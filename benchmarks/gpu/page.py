"""Write the tables of a run on a GPU into docs/speed.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import decoding, many_adapters
from benchmarks.gpu.hosts import SHAPES
from benchmarks.interleaved import OUT_OF_MEMORY, markdown, middle, ratios
from benchmarks.methods import FLOOR
from benchmarks.pages import rewrite

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.gpu -->", "<!-- end -->"
NOT_RUN = "No GPU has run this benchmark yet."
Rows = list[list[object]]


def tables(record: dict[str, Any]) -> str:
    """Format the measurements as Markdown."""
    parts = [_machine(record["machine"]), ""]
    for title, kind, header, rows_of in KINDS:
        sections = [section for section in record["sections"] if section["kind"] == kind]
        rows = [row for section in sections if "left_out" not in section for row in rows_of(section)]
        left_out = [f"- {_name(section)}: {section['left_out']}" for section in sections if "left_out" in section]
        parts += [f"### {title}", "", *([markdown(header, rows)] if rows else [])]
        parts += ["Not measured:", "", *left_out, ""] if left_out else []
    return "\n".join(parts)


def write_page(record: dict[str, Any] | None) -> None:
    """Put the tables between the marks of docs/speed.md, or a sentence if there is no record."""
    rewrite(PAGE, BEGIN, END, tables(record) if record else NOT_RUN)


def _machine(facts: dict[str, Any]) -> str:
    """Describe the machine in a sentence."""
    if "gpu" not in facts:
        return f"Measured on a processor ({facts['processor']}), PyTorch {facts['torch']}."
    memory = f"{facts['gpu_memory'] / 2**30:.0f} GiB"
    return f"Measured on one {facts['gpu']} ({memory}), PyTorch {facts['torch']}, CUDA {facts['cuda']}."


def _name(section: dict[str, Any]) -> str:
    """Name the model, and how it is stored and run."""
    return ", ".join([SHAPES[section["size"]].name, section["frozen"], *["compiled"] * section["compiled"]])


def _step_rows(section: dict[str, Any]) -> Rows:
    seconds, peaks = section["seconds"], section["peaks"]
    rows: Rows = []
    for way, values in seconds.items():
        memory = f"{peaks[way] / 2**30:.1f}" if peaks[way] else OUT_OF_MEMORY
        share = f"{peaks[way] / peaks[FLOOR]:.3f}" if peaks[way] and peaks[FLOOR] else ""
        times = [_milliseconds(values), _to(values, seconds[FLOOR])]
        rows.append([_name(section), way, f"{section['trained'].get(way, 0):,}", *times, memory, share])
    return rows


def _decoding_rows(section: dict[str, Any]) -> Rows:
    seconds = section["seconds"]
    return [
        [_name(section), way, _rate(values), _milliseconds(values), _to(values, seconds[decoding.BASE])]
        for way, values in seconds.items()
    ]


def _many_rows(section: dict[str, Any]) -> Rows:
    read, decoded = (section["seconds"][work] for work in many_adapters.WORK)
    rows: Rows = []
    for way in read:
        cells = [
            cell for each in (read, decoded) for cell in (middle(each[way]), _to(each[way], each[many_adapters.BASE]))
        ]
        rows.append([_name(section), way, *cells])
    return rows


def _to(values: list[float], base: list[float]) -> str:
    """Format the ratio to the first row's way."""
    return "1" if values is base and values else middle(ratios(values, base)) if values and base else ""


def _milliseconds(seconds: list[float]) -> str:
    return middle([1000 * value for value in seconds], 1)


def _rate(seconds: list[float]) -> str:
    return f"{1 / statistics.median(seconds):.1f}" if seconds else OUT_OF_MEMORY


STEP_HEADER = [
    "model",
    "method",
    "weights that train",
    "a step, ms",
    "to the frozen model",
    "peak, GiB",
    "to the frozen model",
]
DECODING_HEADER = ["model", "way", "tokens a second", "a token, ms", "to the base model"]
MANY_HEADER = ["model", "adapters", "a pass, s", "to none", "prompt and some tokens, s", "to none"]
KINDS: list[tuple[str, str, list[str], Callable[[dict[str, Any]], Rows]]] = [
    ("A training step on a GPU", "step", STEP_HEADER, _step_rows),
    ("Decoding on a GPU", "decoding", DECODING_HEADER, _decoding_rows),
    ("Many adapters in a batch on a GPU", "many_adapters", MANY_HEADER, _many_rows),
]
