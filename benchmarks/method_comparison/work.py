"""Do the runs that are left, several at a time."""

from __future__ import annotations

import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from examples.easy_vqa.records import write_json

from .execute import execute
from .plan import needs, plan, rate_of
from .runs import Run, read
from .settings import Sizes

console = Console()


def work(sizes: Sizes, results: Path, output: Path, processes: int, until: float = float("inf")) -> list[Run]:
    """Do the runs that have no record, in the plan's order, several at a time and each in a process of its own.

    Args:
        processes: number of processes with one thread each; 0: do the runs here, one after another.
        until: `time.monotonic()` after which no run starts.
    Returns:
        Runs that failed. Their errors are printed, and the others go on.
    """
    failed: list[Run] = []
    going: dict[Future[None], Run] = {}
    # Spawn processes, since PyTorch's threads do not survive a fork; one per run, whose peak memory is its own.
    pool = ProcessPoolExecutor(max(1, processes), mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        while True:
            records = read(results)
            left = [run for run in plan(sizes, records) if run not in records and run not in failed]
            ready = [run for run in left if run not in going.values() and not needs(run, sizes, records)]
            for run in ready[: max(1, processes) - len(going)]:
                if time.monotonic() > until:
                    break
                job = (run, rate_of(run, sizes, records), sizes, results, output)
                if processes:
                    going[pool.submit(do, *job)] = run
                else:
                    do(*job)
            if processes == 0 and ready and time.monotonic() <= until:
                continue
            if not going:
                return failed
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                error = future.exception()
                if error is not None:
                    failed.append(run)
                    traceback.print_exception(error)
                console.print(f"[bold]{run.kind} {run.name}[/bold]: {'failed' if error else 'done'}")


def do(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> None:
    """Do one run with one thread, and write its record."""
    torch.set_num_threads(1)
    write_json(run.file(results), execute(run, rate, sizes, results, output))
