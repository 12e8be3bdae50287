"""python -m benchmarks.method_comparison: do the runs that are left, or print the plan, or write the report."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from .plan import FULL, REDUCED, describe
from .report import write_report
from .runs import read
from .work import work

RESULTS = Path(__file__).parent.parent / "results" / "method_comparison"
PAGE = Path(__file__).parent.parent.parent / "docs" / "choosing.md"


def main(
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Only print what is done, what is left, and its cost.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write the page from the records.")] = False,
    reduced: Annotated[bool, typer.Option("--reduced", help="Tiny sizes; the numbers mean nothing.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, with one thread each.")] = 2,
    hours: Annotated[float, typer.Option(help="Start no run after this time.")] = float("inf"),
    output: Annotated[Path, typer.Option(help="Files that can be made again.")] = Path("outputs/method_comparison"),
    results: Annotated[Path | None, typer.Option(help="Folder of the records. By default the repository's.")] = None,
) -> None:
    """Do the runs that are left. A second call goes on with the next run."""
    sizes = REDUCED if reduced else FULL
    results = results or (output / "reduced" if reduced else RESULTS)
    if show_plan:
        print(describe(sizes, read(results)))
        return
    failed = [] if report else work(sizes, results, output, processes, time.monotonic() + 3600 * hours)
    write_report(sizes, read(results), PAGE if results == RESULTS else results / "report.md")
    sys.exit(f"{len(failed)} runs failed: {', '.join(run.name for run in failed)}" if failed else 0)


if __name__ == "__main__":
    typer.run(main)
