"""Stand-ins for bitsandbytes' layers, of the same size and with the same saved tensors, but without values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..quantization import Bits

BLOCK = 64  # weights that share one scale, in 4 bits
NESTED_BLOCK = 256  # scales that share one, with double quantization
TABLES = 16 + 256  # float32 values of a layer's look-up tables


class PackedLinear(nn.Module):
    """Stand in for a frozen linear layer packed by bitsandbytes: its storage, and the extra memory of a step.

    Args:
        quantization: "4bit" (nf4 with double quantization) or "8bit" (LLM.int8, a scale per row).
        bias: the layer's bias, which is not packed.
    Source: bitsandbytes 0.50.2, `MatMul4Bit` (keeps the packed weight) and `MatMul8bitLt` (keeps its input as well).
    """

    def __init__(self, in_features: int, out_features: int, quantization: Bits, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.keeps_input = quantization == "8bit"
        weights = in_features * out_features
        if quantization == "8bit":
            self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
            scales = torch.empty(out_features, dtype=torch.float32)
        else:
            self.register_buffer("weight", torch.empty(math.ceil(weights / 2), dtype=torch.uint8))
            self.register_buffer("absmax", torch.empty(math.ceil(weights / BLOCK), dtype=torch.uint8))
            scales = torch.empty(math.ceil(weights / BLOCK / NESTED_BLOCK) + TABLES, dtype=torch.float32)
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (..., in_features) -> (..., out_features); the weight is briefly unpacked into the dtype of `x`."""
        return _Unpacked.apply(x, self.bias, self)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: PackedLinear) -> torch.Tensor:
        ctx.layer, ctx.kept = layer, x if layer.keeps_input else None
        return F.linear(x, _unpack(layer, x), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ _unpack(ctx.layer, gradient), None, None


def _unpack(layer: PackedLinear, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(layer.out_features, layer.in_features)


def pack(model: PreTrainedModel, quantization: Bits) -> None:
    """Replace the layers that transformers would quantize. Output head and tied weights stay unquantized."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in list(model.named_modules()):
        if not (isinstance(module, Conv1D) or type(module) is nn.Linear) or not should_convert_module(name, kept):
            continue
        rows, columns = module.weight.shape
        inputs, outputs = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
        model.set_submodule(name, PackedLinear(inputs, outputs, quantization, module.bias))
