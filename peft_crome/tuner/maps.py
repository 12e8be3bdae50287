"""The linear maps of a bottleneck, as autograd functions that keep little for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


class _Linear(torch.autograd.Function):
    """Compute x W like `F.linear`, but keep `before`, which x was cast from, in place of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: torch.Tensor, x: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, x, before = inputs
        ctx.save_for_backward(weight, x if before is None else before)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        of_weight, of_x = None, None
        if ctx.needs_input_grad[0]:
            of_weight = _outer(gradient, x.to(weight.dtype).to(gradient.dtype), weight)
        if ctx.needs_input_grad[1]:
            of_x = (gradient @ weight.to(gradient.dtype)).to(ctx.dtype)
        return of_weight, of_x, None  # the cast gives `before` its gradient, the sum of two maps'


class _GatedUp(torch.autograd.Function):
    """Compute (act(g) * h) W, and recompute the hidden features in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: torch.Tensor, g: torch.Tensor, h: torch.Tensor, activation: str, keep: torch.Tensor | None, drop: float
    ) -> torch.Tensor:
        return _dropped(ACTIVATIONS[activation](g) * h, keep, drop) @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, g, h, ctx.activation, keep, ctx.drop = inputs
        ctx.save_for_backward(weight, g, h, keep)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, g, h, keep = ctx.saved_tensors
        gate = ACTIVATIONS[ctx.activation](g)
        of_weight, of_g, of_h = None, None, None
        if ctx.needs_input_grad[0]:
            of_weight = _outer(gradient, _dropped(gate * h, keep, ctx.drop), weight)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_hidden = _dropped(gradient @ weight.to(gradient.dtype), keep, ctx.drop)
            of_g, of_h = _slope(ctx.activation, of_hidden * h, g, gate), of_hidden * gate
        return of_weight, of_g, of_h, None, None, None


def _outer(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of a map's weight, summed over tokens; (..., out, in)."""
    if weight.dim() == 2:
        gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return (gradient.mT @ x).to(weight.dtype)


def _dropped(hidden: torch.Tensor, keep: torch.Tensor | None, drop: float) -> torch.Tensor:
    return hidden if keep is None else (hidden * (keep / (1 - drop))).to(hidden.dtype)


def _slope(activation: str, gradient: torch.Tensor, g: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute the gradient with respect to the input of an activation."""
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(gradient, gate)
    if torch.is_grad_enabled():  # PyTorch's kernel has no second derivative
        sigmoid = torch.sigmoid(g)
        return gradient * sigmoid * (1 + g * (1 - sigmoid))
    return torch.ops.aten.silu_backward(gradient, g)


def _apply(function: Any, *arguments: Any) -> torch.Tensor:
    """Apply a function, and record a node of autograd's graph only if a gradient is needed."""
    records = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)
    return function.apply(*arguments) if records else function.forward(*arguments)


class CromeLinear(nn.Linear):
    """Linear map without bias, computed on its input's device, since a device map may put a site elsewhere."""

    function: Any = _Linear

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return _apply(self.function, self.weight.to(x.device), x, *others)


class CromeUp(CromeLinear):
    """The map W_u, which reads both products of the bottleneck."""

    function = _GatedUp


class StackedLinear:
    """Apply the map of each slot's adapter; (slots, tokens, in) -> (slots, tokens, out).

    Args:
        linear: the map of any one of the adapters.
        weight: stacked weights, (slots, out, in).
    """

    def __init__(self, linear: CromeLinear, weight: torch.Tensor) -> None:
        self.function, self.weight = linear.function, weight

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return _apply(self.function, self.weight, *arguments)


Map = CromeLinear | StackedLinear


def products(x: torch.Tensor, gate: Map, down: Map) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute x W_g and x W_d: (..., m) each, in the adapter's dtype."""
    dtype = gate.weight.dtype
    cast, before = (x, None) if x.dtype == dtype else (x.to(dtype), x)  # Dynamo rejects the same tensor twice
    return gate(cast, before), down(cast, before)
