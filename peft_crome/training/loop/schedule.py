"""Schedule the learning rate as in the paper: linear from almost zero to the peak, then a cosine to zero."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

SMALLEST = 1e-12  # share of the peak: torch's linear schedule cannot start at 0


def warmup_then_cosine(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, initial_factor: float
) -> LRScheduler:
    """Build the schedule for every parameter group, each with a separate peak.

    Args:
        warmup_steps: optimizer steps of the linear part; the step of this number has the peak.
        total_steps: number of all optimizer steps; the rate after the last one is 0.
        initial_factor: share of the peak at step 0; 1e-3 in the paper (1e-8 of 1e-5).
    """
    cosine = CosineAnnealingLR(optimizer, T_max=total_steps - warmup_steps)
    if not warmup_steps:
        return cosine
    line = LinearLR(optimizer, start_factor=min(max(initial_factor, SMALLEST), 1.0), total_iters=warmup_steps)
    return SequentialLR(optimizer, [line, cosine], milestones=[warmup_steps])
