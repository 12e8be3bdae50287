"""Draw panels with matplotlib: singular values, heat maps over images, a bar for each token."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import ImageOps

from .look import BranchView, View
from .weights import named_matrices

COLORS = "viridis"  # its lightness grows evenly, for every kind of color vision
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # palette of Okabe and Ito
DASHES = ("-", "--")  # for the first and the second adapter
PANEL = (4.4, 3.1)  # inches
DOTS = 150  # per inch
COLUMNS = 3  # panels side by side in the figure
MOST_BARS = 48  # tokens with a label below their bar

# A drawn quantity of a token: title, label with unit, and the numbers.
Measure = tuple[str, str, Callable[[BranchView], torch.Tensor]]


def measures(gate_activation: str) -> tuple[Measure, Measure]:
    """Return the drawn quantities: gate activity, and the change relative to the embedding."""
    act = {"silu": "SiLU", "sigmoid": "σ"}[gate_activation]
    return (
        ("gate activity", f"mean over units of |{act}(x W_g)|", lambda view: view.activity.gate),
        ("change", "‖change‖ / ‖embedding‖", lambda view: view.activity.relative_change),
    )


def draw_singular_values(axes: Any, views: Sequence[View]) -> None:
    """Draw all singular values of each matrix on a logarithmic axis; the second adapter is dashed."""
    for view, dash in zip(views, DASHES, strict=False):
        for number, (name, matrix) in enumerate(named_matrices(view.report)):
            values = matrix.singular_values.numpy()
            values = np.where(values > 0, values, np.nan)  # zero has no logarithm
            places = np.arange(1, len(values) + 1)
            label = name if view is views[0] else None
            axes.plot(places, values, dash, color=LINES[number % len(LINES)], linewidth=1.4, label=label)
        if len(views) > 1:
            axes.plot([], [], dash, color="gray", linewidth=1.4, label=view.name)
    axes.set(title="Singular values", xlabel="rank (the largest is 1)", ylabel="singular value")
    if not all(view.report.is_identity for view in views):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False, ncols=len(views))


def draw_image(axes: Any, view: BranchView, number: int) -> None:
    """Draw one image as the tower saw it."""
    axes.imshow(np.asarray(view.maps[number].image))
    axes.set(title=f"image {number + 1}, as the tower reads it", xticks=[], yticks=[])


def draw_map(axes: Any, view: BranchView, number: int, measure: Measure, top: float) -> None:
    """Draw a heat map over the image in gray; each square is one token.

    Args:
        number: number of the image.
        measure: the drawn quantity.
        top: the value of the last color, so that maps can be compared.
    """
    title, label, values = measure
    chosen = view.maps[number]
    cells = chosen.values(values(view))
    rows, columns = cells.shape
    extent = (0, columns, rows, 0)
    aspect = (chosen.image.height / rows) / (chosen.image.width / columns)  # so that the grid has the image's shape
    gray = np.asarray(ImageOps.grayscale(chosen.image))
    axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent, aspect=aspect)
    image = axes.imshow(
        cells, cmap=COLORS, norm=Normalize(0, top or 1), alpha=0.68, interpolation="nearest", extent=extent,
        aspect=aspect,
    )  # fmt: skip
    axes.set(title=f"{view.activity.branch}: {title}", xlabel=f"column of {columns} tokens", ylabel=f"row of {rows}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).set_label(label, fontsize=8)


def draw_tokens(axes: Any, view: BranchView, measure: Measure, top: float) -> None:
    """Draw a bar for each token, with its text if there is room."""
    title, label, values = measure
    numbers = values(view).numpy()
    axes.bar(np.arange(len(numbers)), numbers, width=0.8, color=colormaps[COLORS](numbers / (top or 1)))
    axes.set(
        title=f"{view.activity.branch}: {title}",
        ylabel=label,
        ylim=(0, (top or 1) * 1.05),
        xlim=(-0.6, len(numbers) - 0.4),
    )
    texts = [text for text, number in view.words if number is not None]
    if view.activity.token_ids is None or len(texts) > MOST_BARS:
        axes.set_xlabel("token, in the order in which they come")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_xticks(np.arange(len(texts)), [_drawable(text) for text in texts], rotation=90, fontsize=7)
    for tick in axes.get_xticklabels():
        tick.set_parse_math(False)  # a dollar sign is a dollar sign


def scale(views: Sequence[View], branch: str, measure: Measure) -> float:
    """Return the largest value of a branch over all adapters, which gets the last color."""
    _, _, values = measure
    maxima = [float(values(shown).max()) for view in views for shown in view.branches or [] if
              shown.activity.branch == branch]  # fmt: skip
    return max(maxima, default=1.0)


Panel = tuple[str, Callable[[Any], None]]  # alternative text, and the drawing function


def rank_panel(views: Sequence[View]) -> Panel:
    """Build the panel with the singular values of all adapters."""
    ranks = "; ".join(f"{view.name}: effective rank of W_u {view.report.up.effective_rank:.0f}" for view in views)
    return f"Singular values of all matrices. {ranks}", partial(draw_singular_values, views=views)


def branch_panels(views: Sequence[View], view: View, shown: BranchView) -> list[Panel]:
    """Build the panels of one branch: images and heat maps, or bars if its tokens are not cells of an image."""
    panels: list[Panel] = [
        (f"Image {number + 1}", partial(draw_image, view=shown, number=number)) for number in range(len(shown.maps))
    ]
    for measure in measures(view.report.gate_activation):
        top = scale(views, shown.activity.branch, measure)
        title, _, values = measure
        numbers = values(shown)
        what = f"{shown.activity.branch}: {title}, from {numbers.min():.3g} to {numbers.max():.3g}"
        if not shown.maps:
            bars = partial(draw_tokens, view=shown, measure=measure, top=top)
            panels.append((f"Bars, one for each token. {what}", bars))
        for number in range(len(shown.maps)):
            heat = partial(draw_map, view=shown, number=number, measure=measure, top=top)
            panels.append((f"Heat map over image {number + 1}. {what}", heat))
    return panels


def panel_png(draw: Callable[[Any], None], dark: bool) -> bytes:
    """Draw one panel as PNG with a transparent background, for a light or a dark page."""
    with rc_context(_style("#e6e6e6" if dark else "#1f1f1f")):
        figure = Figure(figsize=PANEL, dpi=DOTS, layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="png", transparent=True)
    return file.getvalue()


def draw_figure(views: Sequence[View], path: Path) -> None:
    """Draw all panels as one PNG: singular values on top, then a row of panels for each adapter and kind.

    Args:
        views: one adapter, or two with the same prompt and images.
        path: the file to write.
    """
    rows: list[tuple[str, list[Panel]]] = [("", [rank_panel(views)])]
    for view in views:
        for shown in view.branches or []:
            panels = branch_panels(views, view, shown)
            rows += [
                (f"{view.name}: {shown.activity.branch}", panels[first : first + COLUMNS])
                for first in range(0, len(panels), COLUMNS)
            ]
    columns = max(len(row) for _, row in rows)
    with rc_context(_style("#1f1f1f")):
        size = (PANEL[0] * columns, (PANEL[1] + 0.25) * len(rows))
        figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
        for band, (head, row) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            band.suptitle(head, fontsize=9, fontweight="bold", parse_math=False)
            places = band.subplots(1, columns, squeeze=False)[0]
            for axes, (_, draw) in zip(places, row, strict=False):
                draw(axes)
            for axes in places[len(row) :]:
                axes.set_axis_off()
        figure.savefig(path, format="png", facecolor="white")


def _style(ink: str) -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    quiet = {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    return quiet | dict.fromkeys(inked, ink)


def _drawable(text: str) -> str:
    """Write out characters that matplotlib's font lacks."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode("ascii") for c in text)
