"""Draw the table, the contact sheet and the learning curves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table

from . import data
from .parts import easy_vqa_dir

Row = dict[str, Any]  # name, score (by kind); trained rows also have the fields of a training record


def columns(row: Row) -> list[str]:
    """Format a row of the table."""
    cells = [row["name"]]
    for kind in data.KINDS:
        score = row["score"].get(kind)
        cells.append(f"{score['accuracy']:.1%} ± {score['stderr']:.1%} ({score['n']:,})" if score else "-")
    cells += [f"{row[name]:.0f}" if name in row else "-" for name in ("seconds", "answering_seconds")]
    cells.append(f"{row['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in row else "-")
    cells.append(f"{row['trained_parameters']:,}" if row.get("trained_parameters") else "-")
    cells.append(f"{row['file_bytes'] / 1e6:.1f} MB" if row.get("file_bytes") else "-")
    return cells


HEADER = [
    "",
    "what color / shape (n)",
    "yes/no (n)",
    "training, s",
    "answering, s",
    "peak memory",
    "trained weights",
    "files",
]


def print_table(rows: list[Row], title: str) -> None:
    """Print the table to the terminal."""
    table = Table(title=title, caption="accuracy ± standard error (number of test questions)")
    for name in HEADER:
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        table.add_row(*columns(row))
    Console(width=165).print(table)


def print_language(kept: dict[str, Any]) -> None:
    """Print the results of `language_kept`."""
    loss = kept["text_loss"]
    table = Table(title="Without an image", caption=f"nats a token, over {loss['tokens']:,} tokens of English prose")
    for name in ("", "text loss", kept["question"]):
        table.add_column(name, justify="right" if name == "text loss" else "left")
    table.add_row("with the adapter", f"{loss['adapted']:.6f}", kept["answer"])
    table.add_row("without it", f"{loss['base']:.6f}", kept["base_answer"])
    Console(width=165).print(table)


def markdown_table(rows: list[Row]) -> str:
    """Format the same table in Markdown for a README."""
    lines = [HEADER, ["---"] * len(HEADER), *map(columns, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def contact_sheet(questions: list[Row], answers: list[str], path: Path, count: int = 24) -> None:
    """Draw test images with question and answer, in green if it is right and in red with the truth if it is wrong."""
    figure, axes = plt.subplots(4, count // 4, figsize=(2.3 * count // 4, 10.5))
    step = max(1, len(questions) // count)
    for axis, i in zip(axes.flat, range(0, step * count, step), strict=True):
        row = questions[i]
        axis.imshow(Image.open(easy_vqa_dir() / "test" / "images" / f"{row['image_id']}.png"))
        right = answers[i] == row["answer"]
        verdict = answers[i] or "(nothing)"
        verdict += "" if right else f" (is {row['answer']})"
        axis.set_title(textwrap.fill(row["question"], 30), fontsize=8)
        axis.set_xlabel(verdict, fontsize=9, color="green" if right else "red", fontweight="bold")
        axis.set_xticks([])
        axis.set_yticks([])
    right = sum(answers[i] == questions[i]["answer"] for i in range(0, step * count, step))
    figure.suptitle(f"easy-VQA test images, evenly picked from those asked: {right} of {count} right", fontsize=11)
    _save(figure, path)


def learning_curves(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the training losses on a logarithmic axis. Curves called "... seed N" have one color for all seeds."""
    figure, axis = plt.subplots(figsize=(7, 4))
    colors: dict[str, str] = {}
    for name, points in curves.items():
        kind = name.split(" seed")[0]
        label = None if kind in colors else kind
        color = colors.setdefault(kind, f"C{len(colors)}")
        axis.plot([step for step, _ in points], [loss for _, loss in points], label=label, color=color, linewidth=1)
    axis.set(xlabel="step", ylabel="loss on the answer's tokens", yscale="log", title="Learning curves")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    plt.close(figure)
