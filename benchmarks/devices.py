"""Measure on a device: a clock that waits for it, and the memory in use on it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

SPEED = Path(__file__).parent / "results" / "speed"
Device = Annotated[str, typer.Option("--device", help="Device of the models: cpu, cuda, or one GPU such as cuda:1.")]


def is_gpu(device: str) -> bool:
    """Whether a device is an NVIDIA GPU and not the CPU.

    Raises:
        ValueError: the device is neither, or PyTorch sees no GPU.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"Benchmarks run on cpu or cuda, not on {device!r}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"PyTorch sees no GPU for --device {device}. Write --device cpu.")
    return kind == "cuda"


def results_on(device: str, folder: Path) -> Path:
    """Return the folder for a device's results, so that those of CPU and GPU do not replace each other."""
    results = folder.with_name(f"{folder.name}_cuda") if is_gpu(device) else folder
    results.mkdir(parents=True, exist_ok=True)
    return results


def clock_on(device: str) -> Callable[[], float]:
    """Return a clock in seconds that first waits for all work on the device."""
    if not is_gpu(device):
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def settle(device: str = "cpu") -> None:
    """Free unused memory, and reset the peak."""
    gc.collect()
    if is_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def held(device: str = "cpu") -> int:
    """Return the bytes that this process holds now: resident memory, or tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if is_gpu(device) else status("VmRSS")


def peak(device: str = "cpu") -> int:
    """Return the highest value of `held` since `settle`."""
    return torch.cuda.max_memory_allocated(device) if is_gpu(device) else status("VmHWM")


def in_fresh_process(module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run a benchmark's module in a fresh process, and return the JSON object that it prints last.

    Args:
        arguments: those of its command line.
        environment: variables to set in addition.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def status(key: str) -> int:
    """Read a value of Linux for this process in bytes, such as VmRSS (resident now), VmHWM (its peak) or RssAnon."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1]) * 1024  # type: ignore[index]
