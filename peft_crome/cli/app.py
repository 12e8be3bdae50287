"""Frame of the command line: the app, its errors and its devices."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"peft-crome {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Teach a vision-language model a task with a CROME adapter. Most users need only finetune and evaluate."""
    # PEFT 0.21.2 reads this old name at every attachment; a user of the command line cannot act on it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def fail(error: BaseException) -> NoReturn:
    """Print an error and exit with status 1."""
    Console(stderr=True).print("[red]Error:[/red]", end=" ")
    print(error, file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def printing_errors() -> Iterator[None]:
    """Print an error of the block that a user can act on, and exit with status 1."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        fail(error)


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    overflow: Any = "ellipsis",
    **settings: Any,
) -> None:
    """Print a table. Its texts are printed as they are, without Rich's markup.

    Args:
        left: numbers of the columns that are aligned to the left.
        overflow: what Rich does with a text that is wider than its column.
        settings: arguments of Rich's `Table`.
    """
    columns = [
        Column(escape(heading), justify="left" if number in left else "right", overflow=overflow)
        for number, heading in enumerate(headings)
    ]
    table = Table(*columns, **settings)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def place(device: str | None) -> str | None:
    """Return the device of a model: the value of `--device`, else the accelerator if there is one.

    Raises:
        ValueError: this PyTorch has no such device.
    """
    import torch

    there = torch.accelerator.is_available()
    if device is not None and torch.device(device).type != "cpu" and not there:
        raise ValueError(f"--device {device}: this PyTorch sees no accelerator. Leave the option out.")
    return device or (str(torch.accelerator.current_accelerator()) if there else None)
