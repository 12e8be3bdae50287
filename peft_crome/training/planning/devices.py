"""Memory and speed of devices: from data sheets for GPUs by name, measured for this machine's device."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import psutil
import torch
from torch.utils.benchmark import Timer

GIB = 2**30
# GPU memory that the tensors of a step cannot use: CUDA's context and workspaces, and gaps between blocks. Our
# estimate, with some reserve; not measured.
RESERVED, LOST = GIB, 0.05
# Share of this machine's memory lost between blocks of glibc's malloc: up to 24% in benchmarks/results/memory.
LOST_ON_CPU = 0.25
# Share of the peak rate of dense matrix products that a step reaches on a GPU. Our estimate: large trainings report
# 30% to 50% (PaLM, arXiv 2204.02311, 46%; Llama 3, arXiv 2407.21783, 38% to 43%).
SHARE = 0.4
# Ratio of a step's time to the time of its products alone. Our range: covers all steps of benchmarks/results/memory.
SLOWER = (1.0, 3.0)
MEASURED = (1 / SLOWER[0], 1 / SLOWER[1])  # share of its measured rate that a step reaches


class DeviceError(ValueError):
    """A GPU's name is unknown."""


@dataclass(frozen=True)
class Device:
    """A device that a step is to run on.

    Attributes:
        name: name for people.
        memory: bytes that the tensors of a step can use.
        rates: dtype -> floating-point operations per second of dense matrix products; empty: unknown.
        share: lower and upper share of that rate that a step reaches.
    """

    name: str
    memory: int
    rates: dict[torch.dtype, float]
    share: tuple[float, float]

    def seconds(self, flops: int, dtype: torch.dtype) -> tuple[float, float] | None:
        """Return the lower and upper time of so many operations; None: unknown."""
        rate = self.rates.get(dtype)
        return None if rate is None else (flops / rate / self.share[0], flops / rate / self.share[1])


def _gpu(name: str, gibibytes: float, half: float, single: float, bfloat16: bool = True) -> Device:
    rates = {torch.float16: half * 1e12, torch.float32: single * 1e12}
    rates |= {torch.bfloat16: half * 1e12} if bfloat16 else {}
    return Device(name, usable(gibibytes), rates, (SHARE, SHARE))


def usable(gibibytes: float) -> int:
    """Return the bytes of a GPU's memory that tensors can use."""
    return int(gibibytes * GIB * (1 - LOST)) - RESERVED


# Dense TFLOP/s with accumulation in float32: half precision, then float32. Sources: NVIDIA's data sheets of H100
# SXM, A100 SXM, L40S and T4; NVIDIA's white papers of the Ada (RTX 4090) and GA102 (RTX 3090) architectures. Memory as
# the driver shows it: the L40S and the T4 give up a part to error correction.
GPUS = {
    "h100": _gpu("H100 (80 GB)", 80, 989, 67),
    "a100-80": _gpu("A100 (80 GB)", 80, 312, 19.5),
    "a100-40": _gpu("A100 (40 GB)", 40, 312, 19.5),
    "l40s": _gpu("L40S (48 GB)", 45, 362, 91.6),
    "rtx4090": _gpu("RTX 4090 (24 GB)", 24, 165, 82.6),
    "rtx3090": _gpu("RTX 3090 (24 GB)", 24, 71, 35.6),
    "t4": _gpu("T4 (16 GB)", 15, 65, 8.1, bfloat16=False),
}


def find_gpu(name: str) -> Device:
    """Find a GPU by name, or build one with so many gibibytes: "48gb".

    Raises:
        DeviceError: the name is unknown; lists the known ones.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gi?b", name.lower())
    if size and usable(float(size[1])) > 0:
        return Device(f"a GPU with {size[1]} GB", usable(float(size[1])), {}, (SHARE, SHARE))
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    raise DeviceError(
        f"--gpu {name!r} is unknown; known are {', '.join(GPUS)}, and any size of more than 2 GB: 48gb."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )


def this_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Describe the device that a process trains on: free memory plus what is in use by it, and its measured rate.

    On a CPU float32 is measured as well, since many CPUs have no instructions for a shorter dtype.
    """
    if device.type == "cpu":
        memory = psutil.virtual_memory().available + psutil.Process().memory_info().rss
        rates = {kind: matmul_rate(device, kind) for kind in {dtype, torch.float32}}
        return Device("this machine's CPU", int(memory * (1 - LOST_ON_CPU)), rates, MEASURED)
    if device.type != "cuda":  # PyTorch reports the memory of no other device
        return Device(str(device), psutil.virtual_memory().total, {dtype: matmul_rate(device, dtype)}, MEASURED)
    free, _ = torch.cuda.mem_get_info(device)
    memory = int((free + torch.cuda.memory_reserved(device)) * (1 - LOST))
    return Device(torch.cuda.get_device_name(device), memory, {dtype: matmul_rate(device, dtype)}, MEASURED)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product, for half a second."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.3).median
