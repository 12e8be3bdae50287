"""Write rows of text about one adapter or two, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from .look import View
from .weights import named_matrices

MATRIX_HEADINGS = ("adapter", "matrix", "weights", "largest singular value", "effective rank", "dead units")
ACTIVITY_HEADINGS = (
    "branch",
    "tokens",
    "‖embedding‖",
    "‖change‖",
    "‖change‖ / ‖embedding‖",
    "gate",
    "silent units",
)


def facts(views: Sequence[View]) -> list[tuple[str, list[str]]]:
    """List facts from the files: a name, and a cell for each adapter."""
    reports = [view.report for view in views]
    return [
        ("base model", [report.base_model or "not named" for report in reports]),
        ("architecture", [report.model_type or "not recorded" for report in reports]),
        ("width d, hidden units m", [f"{report.hidden_size:,}, {report.bottleneck_dim:,}" for report in reports]),
        ("gate activation", [report.gate_activation for report in reports]),
        ("weights, stored as", [f"{report.parameters:,}, {report.dtype}" for report in reports]),
        ("other weights in the file", [f"{report.other_parameters:,}" for report in reports]),
        (
            "changes anything",
            ["no: W_u is zero, an identity" if report.is_identity else "yes" for report in reports],
        ),
    ]


def matrix_rows(views: Sequence[View]) -> list[list[str]]:
    """Write a row for each matrix of each adapter, under `MATRIX_HEADINGS`. All branches share W_u."""
    rows = []
    for view in views:
        report = view.report
        size = report.hidden_size * report.bottleneck_dim
        for name, matrix in named_matrices(report):
            dead = int(matrix.is_dead.sum())
            numbers = [f"{float(matrix.singular_values[0]):.3g}", f"{matrix.effective_rank:.1f}"]
            rows.append([view.name, name, f"{size:,}", *numbers, f"{dead} of {report.bottleneck_dim}"])
    return rows


def activity_rows(view: View) -> list[list[str]]:
    """Write a row for each branch and site, under `ACTIVITY_HEADINGS`, with means over tokens."""
    rows = []
    for shown in view.branches or []:
        activity = shown.activity
        means = (activity.embedding_norm, activity.change_norm, activity.relative_change, activity.gate)
        silent = f"{len(activity.silent_units)} of {len(activity.unit_peaks)}"
        numbers = [f"{float(values.mean()):.3g}" for values in means]
        rows.append([activity.branch, f"{len(activity.gate):,}", *numbers, silent])
    return rows
