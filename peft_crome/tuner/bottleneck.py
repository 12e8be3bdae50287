"""The equation: (act(x W_g) * (x W_d)) W_u, a gated bottleneck."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


class CromeLinear(nn.Linear):
    """A linear map without bias, computed on its input's device: a device map may have put a site on another one."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.device))


def gate_and_hidden(
    x: torch.Tensor, gate: nn.Linear, down: nn.Linear, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate act(x W_g), and the hidden features act(x W_g) * (x W_d): (..., m) each, in the adapter's dtype.

    Args:
        x: embeddings, (..., d); any float dtype.
    """
    x = x.to(gate.weight.dtype)
    gate_values = ACTIVATIONS[activation](gate(x))
    return gate_values, gate_values * down(x)


def gated_product(
    x: torch.Tensor, gate: nn.Linear, down: nn.Linear, up: nn.Linear, activation: str, dropout: float = 0.0
) -> torch.Tensor:
    """(act(x W_g) * (x W_d)) W_u: what one adapter adds to a token; (..., d), in the adapter's dtype.

    Args:
        x: embeddings, (..., d); any float dtype.
        dropout: probability of dropping a hidden feature.
    Source: CROME, arXiv 2408.06610; the form is reconstructed from its prose.
    """
    _, hidden = gate_and_hidden(x, gate, down, activation)
    return up(F.dropout(hidden, dropout))
