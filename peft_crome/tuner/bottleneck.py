"""The equation: (act(x W_g) * (x W_d)) W_u, a gated bottleneck."""

from __future__ import annotations

import torch

from .maps import ACTIVATIONS, Map, products


def gate_and_hidden(x: torch.Tensor, gate: Map, down: Map, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gate act(x W_g) and the hidden features act(x W_g) * (x W_d): (..., m) each, in the adapter's dtype.

    Args:
        x: embeddings, (..., d); any float dtype.
    """
    g, h = products(x, gate, down)
    gate_values = ACTIVATIONS[activation](g)
    return gate_values, gate_values * h


def gated_product(
    x: torch.Tensor, gate: Map, down: Map, up: Map, activation: str, dropout: float = 0.0
) -> torch.Tensor:
    """Compute (act(x W_g) * (x W_d)) W_u, which one adapter adds to a token; (..., d), in the adapter's dtype.

    The backward pass keeps x in its dtype, x W_g and x W_d: 2d + 8m bytes a token for x in bf16.

    Args:
        x: embeddings, (..., d); any float dtype.
        dropout: probability of dropping a hidden feature.
    Source: CROME, arXiv 2408.06610; the form is reconstructed from its prose.
    """
    g, h = products(x, gate, down)
    keep = torch.empty_like(g).bernoulli_(1 - dropout).bool() if dropout else None
    return up(g, h, activation, keep, dropout)
