"""The paper's learning rate: a line from almost nothing up to the peak, then a cosine down to zero."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def factor(step: int, *, warmup_steps: int, total_steps: int, initial_factor: float) -> float:
    """The learning rate at a step, as a share of its peak.

    Args:
        step: optimiser steps done.
        warmup_steps: steps of the line; the step of this number has the peak.
        total_steps: all steps; the rate after the last one is 0.
        initial_factor: share of the peak at step 0; 1e-3 in the paper (1e-8 of 1e-5).

    Example:
        >>> [round(factor(s, warmup_steps=2, total_steps=6, initial_factor=0.5), 3) for s in range(7)]
        [0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return initial_factor + (1 - initial_factor) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_then_cosine(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, initial_factor: float
) -> LambdaLR:
    """The schedule of `factor` for every parameter group, each with its own peak."""

    def share(step: int) -> float:
        return factor(step, warmup_steps=warmup_steps, total_steps=total_steps, initial_factor=initial_factor)

    return LambdaLR(optimizer, share)
