"""bitsandbytes' 4-bit layers on a CPU with AVX-512 BF16, where they repack their weights when they are evaluated.

What is repacked lets no gradient through, and nothing says so (bitsandbytes 0.50.2, `Linear4bit.forward` and
`matmul_4bit`): a model that was asked something, or evaluated between two steps, would not train on. A layer whose
sizes do not fit the other order fails. On other devices nothing is repacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

REPACKS = "support_avx512bf16_for_cpu"  # the layer's own switch
ROWS = 32  # that the other order puts together
BLOCK = 64  # weights to a scale, unless the layer's state says otherwise


def let_gradients_through(model: nn.Module) -> None:
    """Have repacked layers go back to the usual order when a gradient has to pass; evaluation is as fast as before."""
    for module in _repacking(model):
        if _unpack not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_unpack)


def repack_what_fits(model: nn.Module) -> None:
    """Keep layers whose sizes do not fit the other order (the MLP of SigLIP so400m) from being repacked."""
    for module in _repacking(model):
        block = getattr(getattr(module.weight, "quant_state", None), "blocksize", BLOCK)
        if module.out_features % ROWS or module.in_features % block:
            setattr(module, REPACKS, False)


def _repacking(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, REPACKS, False)]


def _unpack(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    repacked = getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
    if repacked and torch.is_grad_enabled() and inputs[0].requires_grad:
        module.state_dict()  # bitsandbytes' own way back: what it stores is in the usual order
