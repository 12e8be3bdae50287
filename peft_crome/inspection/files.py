"""Write the two files of an inspection, complete or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..utils.atomic import moved_into
from .look import View

EXTRA = 'pip install "peft-crome[plots]"'


def output_files(output: str | Path) -> tuple[Path, Path]:
    """Return page and figure for one name: `runs/look` or `runs/look.html` gives both."""
    output = Path(output)
    stem = output.with_suffix("") if output.suffix in (".html", ".png") else output
    return stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.png")


def check_output(output: str | Path, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, files that `write_inspection` could not write.

    Raises:
        ValueError: a file exists already, or its folder does not exist.
    """
    files = output_files(output)
    folder = files[0].absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{output}: there is no folder {folder}. Make it, or name another output.")
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder. Name another output.")
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists already and is not overwritten. Name another output, or overwrite it.")


def write_inspection(views: Sequence[View], output: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write one HTML page with everything in it, and one PNG figure of its panels.

    Args:
        views: results of `look`, for one adapter, or for two with the same prompt and images.
        output: name of both files, without ".html" and ".png".
        overwrite: whether to replace files of these names.
    Returns:
        The paths of the page and of the figure.
    Raises:
        ValueError: a file exists already, or its folder does not exist.
        ImportError: matplotlib or Jinja is not installed.
    """
    check_output(output, overwrite)
    try:
        from .drawing import draw_figure
        from .page import write_html
    except ImportError as error:
        raise ImportError(f"Images need {error.name!r}, which is not installed. Write: {EXTRA}") from error

    page, figure = output_files(output)
    with moved_into(page.absolute().parent) as temporary:
        (temporary / page.name).write_text(write_html(views), encoding="utf-8")
        draw_figure(views, temporary / figure.name)
    return page, figure
