"""bitsandbytes' 4-bit layers on a CPU with AVX-512 BF16, where they repack their weights when they are evaluated.

What is repacked lets no gradient through, of which PyTorch only warns (bitsandbytes 0.50.2, `Linear4bit.forward` and
`matmul_4bit`): a model that was asked something, or evaluated between two steps, would not train on. A layer whose
sizes do not fit the other order fails. On other devices nothing is repacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

REPACKS = "support_avx512bf16_for_cpu"  # the layer's own switch
ROWS = 32  # that the other order puts together
BLOCK = 64  # weights to a scale, in a layer that is not quantized yet


def mend_repacking(model: nn.Module) -> None:
    """Have layers that fit go back to the usual order when a gradient has to pass, and keep others from repacking.

    An evaluation packs anew what fits. What does not: the MLP of SigLIP so400m (1152 and 4304), for one.
    """
    for module in model.modules():
        if not getattr(module, REPACKS, False):
            continue
        block = getattr(getattr(module.weight, "quant_state", None), "blocksize", BLOCK)
        if module.out_features % ROWS or module.in_features % block:
            setattr(module, REPACKS, False)
        elif _unpack not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_unpack)


def _unpack(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    repacked = getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
    if repacked and torch.is_grad_enabled() and inputs[0].requires_grad:
        module.state_dict()  # bitsandbytes' own way back: what it stores is in the usual order
