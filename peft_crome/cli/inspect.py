"""The command peft-crome inspect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import console, place, print_table, printing_errors
from .evaluate import system_of
from .options import Device


def inspect(
    adapter: Annotated[str, typer.Argument(help="Hub name or directory of an adapter or a stage.")],
    other: Annotated[str | None, typer.Argument(help="A second adapter to compare with.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Run the model on this prompt, and show how strongly the adapter acts on it.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to put before the prompt. Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to run. Default: the one that the adapter names.")] = None,
    system: Annotated[str | None, typer.Option(help="System message. Default: the one used in training.")] = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write a page and a figure, NAME.html and NAME.png, to this NAME.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite these two files if they exist.")] = False,
) -> None:
    """Show what an adapter has learned, from its weights. With --prompt, also show what it does to an input."""
    from ..data import open_image
    from ..inspection import look, write_inspection
    from ..inspection.files import check_output

    with printing_errors():
        if prompt is None and (image or model or system):
            raise ValueError("--image, --model and --system need --prompt, which the backbone is run on.")
        if output is not None:
            check_output(output, overwrite)
        for path in image or []:
            open_image(path, f"--image {path}")  # check images before a backbone is loaded
        names = [adapter] if other is None else [adapter, other]
        views = []
        for name, short in zip(names, _short(names), strict=True):
            system_message = system if system is not None or prompt is None else system_of(name)
            view = look(
                name,
                prompt=prompt,
                images=[str(path) for path in image or []],
                model=model,
                system=system_message,
                device=place(device),
            )
            views.append(dataclasses.replace(view, name=short))
        _report(views)
        if output is not None:
            page, figure = write_inspection(views, output, overwrite=overwrite)
            console.print(f"{page} and {figure} are written.", markup=False, soft_wrap=True)


def _short(names: list[str]) -> list[str]:
    """Shorten paths to their last part without the common end; number them if they do not differ."""
    parts = [list(Path(name).absolute().parts) for name in names]
    if len(parts) == 1:
        return [parts[0][-1]]
    while min(map(len, parts)) > 1 and parts[0][-1] == parts[1][-1]:
        for path in parts:
            path.pop()
    ends = [path[-1] for path in parts]
    return ends if len(set(ends)) == len(ends) else [f"{end} ({number})" for number, end in enumerate(ends, start=1)]


def _report(views: list[Any]) -> None:
    from ..inspection.tables import ACTIVITY_HEADINGS, MATRIX_HEADINGS, activity_rows, facts, matrix_rows

    rows = [(name, *cells) for name, cells in facts(views)]
    names = ["", *(view.name for view in views)]
    print_table(names, rows, left=range(len(names)), overflow="fold", show_header=len(views) > 1)
    print_table(MATRIX_HEADINGS, matrix_rows(views), left=(0, 1), overflow="fold")
    for view in views:
        if view.branches is not None:
            console.print(f"{view.name} on this input, means over tokens:", markup=False, soft_wrap=True)
            print_table(ACTIVITY_HEADINGS, activity_rows(view), overflow="fold")
