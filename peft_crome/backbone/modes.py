"""Evaluate a model that may be in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .four_bit import fix_repacking


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into its mode at the end of the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """Call a model that may be in training or compiled, without a gradient, a compilation or a random number drawn."""
    fix_repacking(model)  # an evaluation would end 4-bit training on a CPU
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with (
        evaluating(model),
        torch.no_grad(),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
