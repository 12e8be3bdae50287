"""What `merge_and_unload` leaves of a site whose branch cannot be merged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .containers import map_embeddings
from .tuner.layer import CromeWeights, gated_product


class UnloadedSite(nn.Module):
    """What `merge_and_unload` leaves of a site whose branch cannot be merged: the module and its frozen adapters.

    Plain modules without PEFT's names: the model can take new adapters, and these are no part of them.
    """

    def __init__(self, site: nn.Module, weights: CromeWeights, branch: str, adapter_names: list[str]) -> None:
        super().__init__()
        self.site = site
        self.adapters = nn.ModuleList()
        for name in adapter_names:
            parts = {"gate": f"crome_gate_{branch}", "down": f"crome_down_{branch}", "up": "crome_up"}
            self.adapters.append(
                nn.ModuleDict({k: copy.deepcopy(getattr(weights, v)[name]) for k, v in parts.items()})
            )
        self.adapters.requires_grad_(False)
        self.activations = [weights.settings[name][0] for name in adapter_names]
        self.out_features = weights.crome_up[adapter_names[0]].out_features

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "site" or name.startswith("_"):
                raise
            return getattr(self.site, name)  # a model may read its projector's settings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The site's output with its adapters added."""
        return map_embeddings(self.site(*args, **kwargs), self.out_features, self._adapt)

    def _adapt(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for adapter, activation in zip(self.adapters, self.activations, strict=True):
            y = y + gated_product(x, adapter["gate"], adapter["down"], adapter["up"], activation)
        return y.to(x.dtype)
