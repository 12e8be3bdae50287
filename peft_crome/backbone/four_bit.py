"""Keep 4-bit layers of bitsandbytes trainable on a CPU with AVX-512 BF16, where an evaluation repacks their weights.

Repacked weights let no gradient through, and PyTorch only warns (bitsandbytes 0.50.2, `Linear4bit.forward` and
`matmul_4bit`). A model that was evaluated between two steps would stop training. A layer whose sizes do not fit the
packed order fails. On other devices nothing is repacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

REPACKS = "support_avx512bf16_for_cpu"  # the layer's switch
ROWS = 32  # rows that the packed order joins
BLOCK = 64  # weights per scale in a layer that is not quantized yet


def fix_repacking(model: nn.Module) -> None:
    """Unpack layers when a gradient has to pass, and keep layers that do not fit from repacking.

    The next evaluation packs again what fits. The MLP of SigLIP so400m (1152 and 4304), for example, does not fit.
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
        module.state_dict()  # bitsandbytes unpacks here: it stores the usual order
