"""Write one self-contained HTML file: tables, panels as data URIs, tokens in color."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ..utils.templates import render
from ..version import __version__
from .activity import SILENT
from .drawing import COLORS, Measure, Panel, branch_panels, measures, panel_png, rank_panel, scale
from .look import BranchView, View
from .tables import ACTIVITY_HEADINGS, MATRIX_HEADINGS, activity_rows, facts, matrix_rows
from .weights import DEAD

NO_GRID = (
    "How this host lays the tokens of an image out is not known to peft-crome, so they stand in the order in which "
    "they come, and not over the image."
)


def write_html(views: Sequence[View]) -> str:
    """Write the page about one adapter, or about two side by side.

    Args:
        views: results of `look`; two must have the same prompt and images.
    """
    return render(
        "inspection/page.html",
        title="CROME adapter " + " and ".join(view.name for view in views),
        version=__version__,
        prompt=views[0].prompt,
        images=views[0].images,
        views=views,
        facts=facts(views),
        matrix_headings=MATRIX_HEADINGS,
        matrices=matrix_rows(views),
        dead=f"{DEAD:g}",
        silent=f"{SILENT:.0%}",
        shared=[rank_panel(views)],
        activity_headings=ACTIVITY_HEADINGS,
        shown=[
            {
                "name": view.name,
                "rows": activity_rows(view),
                "branches": [_branch(views, view, shown) for shown in view.branches],
            }
            for view in views
            if view.branches is not None
        ],
        gradient=", ".join(to_hex(colormaps[COLORS](step / 8)) for step in range(9)),
        show=_image,
    )


def _branch(views: Sequence[View], view: View, shown: BranchView) -> dict[str, Any]:
    activity = shown.activity
    is_text = activity.token_ids is not None
    return {
        "title": f"{activity.branch}, at {activity.site}",
        "note": "" if shown.maps or is_text else NO_GRID,
        "panels": [] if is_text else branch_panels(views, view, shown),
        "texts": [] if shown.maps else [_text(views, shown, each) for each in measures(view.report.gate_activation)],
    }


def _text(views: Sequence[View], shown: BranchView, measure: Measure) -> dict[str, Any]:
    title, label, values = measure
    numbers, top = values(shown), scale(views, shown.activity.branch, measure)
    tokens = []
    for text, number in shown.words:
        if number is None:
            tokens.append({"text": text, "color": None, "ink": None, "value": None})
            continue
        value = float(numbers[number])
        red, green, blue, _ = colormaps[COLORS](value / (top or 1))
        light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2  # approximately WCAG's luminance
        ink = "#000" if light > 0.18 else "#fff"
        tokens.append(
            {"text": text, "color": to_hex((red, green, blue)), "ink": ink, "value": f"{title}: {value:.3g}"}
        )
    return {"label": f"{title}, {label}", "top": f"{top:.3g}", "tokens": tokens}


def _image(panel: Panel) -> Markup:
    """Embed a panel as an image for a light page and one for a dark page."""
    text, draw = panel
    light, dark = (
        "data:image/png;base64," + base64.b64encode(panel_png(draw, dark=dark)).decode("ascii")
        for dark in (False, True)
    )
    return Markup(  # the parts are base64 or escaped
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(text)}"></picture>'
    )
