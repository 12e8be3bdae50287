"""Draw accuracy over the loss on text, and over the number of training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """List the names that no other one beats: at most its loss and at least its accuracy, and better in one of them.

    Args:
        points: name -> (loss, accuracy).
    """
    return [
        name
        for name, (loss, accuracy) in points.items()
        if not any(x <= loss and y >= accuracy and (x, y) != (loss, accuracy) for x, y in points.values())
    ]


def over_text(points: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Plot each method's mean accuracy over the loss on text that it costs, with the Pareto front."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, (loss, accuracy)) in enumerate(points.items()):
        axis.plot(loss, 100 * accuracy, "o", color=f"C{number}", label=name)
    best = sorted(points[name] for name in front(points))
    axis.step([x for x, _ in best], [100 * y for _, y in best], where="post", color="gray", linewidth=0.8)
    axis.set(xlabel="loss on text, nats a token more than the base model", ylabel="mean accuracy on new images, %")
    _save(figure, axis, path)


def over_examples(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Plot each method's accuracy over the number of training images."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in curves.items():
        axis.plot([count for count, _ in points], [100 * value for _, value in points], "o-", label=name)
    axis.set(xscale="log", xlabel="training images", ylabel="accuracy on new images, %")
    _save(figure, axis, path)


def _save(figure: Any, axis: Any, path: Path) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    plt.close(figure)
