"""Hold all adapters' weights on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .bottleneck import gated_product
from .config import CromeConfig
from .maps import CromeLinear, CromeUp

GATE = "crome_gate_"
DOWN = "crome_down_"
Stack = Callable[[nn.ModuleDict, torch.device], Any]  # one kind of map of all adapters -> the batch's, as one map
NAME = "crome"  # the child of the wrapped model that holds every adapter's weights


class CromeWeights(nn.Module, BaseTunerLayer):
    """Hold all adapters' weights, registered once on the wrapped model as its child `crome`; sites only refer to it.

    W_u is therefore one tensor for any number of sites, and a file's keys do not depend on the sites. The children are
    ModuleDicts from adapter name to a CromeLinear: `crome_up` (m -> d), and for each branch of any adapter
    `crome_gate_<branch>` and `crome_down_<branch>` (d -> m); d is the language model's width.
    """

    weight = bias = None  # BaseTunerLayer would look for them in a base layer
    other_param_names = ("settings",)  # deleted with an adapter

    def __init__(self) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ("crome_up",)
        self.crome_up = nn.ModuleDict()
        self.settings: dict[str, tuple[str, float]] = {}  # adapter name -> gate activation, dropout
        self.observer: Any = None  # its `see` receives each call of a site
        self.override: Any = None  # (site, output, first argument) -> another output, or None; any thread may end it
        self.merged_adapters: list[str] = []

    def branches_of(self, adapter_name: str) -> list[str]:
        """List the branches of one adapter, in the order in which branches came to the model."""
        gates = [name for name in self.adapter_layer_names if name.startswith(GATE)]
        return [name.removeprefix(GATE) for name in gates if adapter_name in getattr(self, name)]

    def linears_of(self, adapter_name: str) -> dict[str, CromeLinear]:
        """Return the maps of one adapter by name, "crome_up" first."""
        dicts = {name: getattr(self, name) for name in self.adapter_layer_names}
        return {name: linears[adapter_name] for name, linears in dicts.items() if adapter_name in linears}

    def add(
        self, adapter_name: str, config: CromeConfig, branches: Iterable[str], hidden_size: int, rms: float
    ) -> None:
        """Create one adapter's weights in fp32: (2·branches + 1)·d·m of them.

        Args:
            config: configuration with `bottleneck_dim` filled in.
            hidden_size: d, the language model's width.
            rms: root mean square of the language model's embeddings. The scheme "scaled" divides by rms·sqrt(d), so
                that the inputs of gate and product have unit variance on text at any scale of the backbone.
        """
        m = config.bottleneck_dim
        assert m is not None
        self.in_features = self.out_features = hidden_size
        self.settings[adapter_name] = (config.gate_activation, float(config.dropout))
        for name in ["crome_up", *(kind + branch for branch in branches for kind in (GATE, DOWN))]:
            if name not in self.adapter_layer_names:
                self.add_module(name, nn.ModuleDict())
                self.adapter_layer_names += (name,)
            is_up = name == "crome_up"
            linear = CromeUp(m, hidden_size) if is_up else CromeLinear(hidden_size, m)
            getattr(self, name)[adapter_name] = linear
            if linear.weight.is_meta:
                continue
            if is_up and config.init_weights is not False:
                nn.init.zeros_(linear.weight)
            else:
                scaled = rms / m**0.5 if is_up else 1 / (rms * hidden_size**0.5)
                nn.init.normal_(linear.weight, std=0.02 if config.init_weights == "normal" else scaled)

    def forward(self, x: torch.Tensor, branch: str, adapter_name: str, stack: Stack | None = None) -> torch.Tensor:
        """Compute what one adapter adds to the embeddings of a branch; (..., d), in the adapter's dtype.

        Args:
            stack: stacks the maps that x's first axis needs, one for each slot (see `Slots`).
        """
        activation, dropout = self.settings[adapter_name]
        kinds = [getattr(self, name) for name in (GATE + branch, DOWN + branch, "crome_up")]
        gate, down, up = (kind[adapter_name] if stack is None else stack(kind, x.device) for kind in kinds)
        return gated_product(x, gate, down, up, activation, dropout if self.training else 0.0)

    def _nothing_to_do(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the sites merge and move adapters."""

    merge = unmerge = _move_adapter_to_device_of_base_layer = _nothing_to_do

    def unload_and_optionally_merge_module(self, merge: bool, *args: Any, **kwargs: Any) -> CromeWeights:
        """Return what takes this module's place: itself if sites stay and need it, else an empty one."""
        return self if merge else CromeWeights()
