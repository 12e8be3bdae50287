"""The gated bottleneck, and the wrapper that adds it to a module's embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..containers import map_embeddings
from ..merging import Mergeable
from .config import CromeConfig

GATE, DOWN = "crome_gate_", "crome_down_"
ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


class CromeLinear(nn.Linear):
    """A linear map without bias, computed where its input is: device maps and DataParallel put sites elsewhere."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.device))


TokenRanges = list[tuple[int, int]]


def in_ranges(input_ids: torch.Tensor, ranges: TokenRanges) -> torch.Tensor:
    """Which token ids lie in one of the half-open ranges; bool, of the shape of `input_ids`."""
    return torch.stack([(input_ids >= start) & (input_ids < stop) for start, stop in ranges]).any(0)


def gated_product(
    x: torch.Tensor, gate: nn.Linear, down: nn.Linear, up: nn.Linear, activation: str, dropout: float = 0.0
) -> torch.Tensor:
    """(act(x W_g) * (x W_d)) W_u: what one adapter adds to a token, in the adapter's dtype.

    Args:
        x: embeddings, (..., d); any float dtype.
    Source: CROME, arXiv 2408.06610; the form is reconstructed from its prose.
    """
    x = x.to(gate.weight.dtype)
    hidden = ACTIVATIONS[activation](gate(x)) * down(x)
    return up(F.dropout(hidden, dropout))


class CromeWeights(nn.Module, BaseTunerLayer):
    """All adapters' weights, registered once on the wrapped model as its child `crome`; sites only refer to it.

    So W_u is one tensor however many sites use it, and a file's keys do not depend on where the sites are. Children,
    each a ModuleDict from adapter name to a CromeLinear: `crome_up` (m -> d), and for each branch of any adapter
    `crome_gate_<branch>` and `crome_down_<branch>` (d -> m); d is the language model's width.
    """

    weight = bias = None  # BaseTunerLayer would look for them in a base layer, and there is none
    other_param_names = ("settings",)  # deleted with an adapter

    def __init__(self) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ("crome_up",)
        self.crome_up = nn.ModuleDict()
        self.settings: dict[str, tuple[str, float]] = {}  # adapter name -> gate activation, dropout
        self.observer: Any = None  # sees what goes through the sites: guard.py
        self.rows: Any = None  # mixed_batch.py: calls in which each row has its own adapter
        self.sites = 0  # that refer to these weights
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def branches_of(self, adapter_name: str) -> list[str]:
        """The branches of one adapter, in the order in which branches came to the model."""
        gates = [name for name in self.adapter_layer_names if name.startswith(GATE)]
        return [name.removeprefix(GATE) for name in gates if adapter_name in getattr(self, name)]

    def linears_of(self, adapter_name: str) -> dict[str, CromeLinear]:
        """The maps of one adapter by name, "crome_up" the first."""
        dicts = {name: getattr(self, name) for name in self.adapter_layer_names}
        return {name: linears[adapter_name] for name, linears in dicts.items() if adapter_name in linears}

    def add(
        self, adapter_name: str, config: CromeConfig, branches: Iterable[str], hidden_size: int, rms: float
    ) -> None:
        """Create one adapter's weights in fp32: (2·branches + 1)·d·m of them.

        Args:
            config: `bottleneck_dim` is filled in.
            hidden_size: d.
            rms: root mean square of the language model's own embeddings. The scheme "scaled" divides by rms·sqrt(d),
                so that what enters gate and product has unit variance on text, whatever the backbone's scale.
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
            linear = CromeLinear(m, hidden_size) if is_up else CromeLinear(hidden_size, m)
            getattr(self, name)[adapter_name] = linear
            if linear.weight.is_meta:
                continue
            if not is_up:
                nn.init.normal_(
                    linear.weight, std=0.02 if config.init_weights == "normal" else 1 / (rms * hidden_size**0.5)
                )
            elif config.init_weights is False:
                nn.init.normal_(linear.weight, std=rms / m**0.5)
            else:
                nn.init.zeros_(linear.weight)

    def forward(self, x: torch.Tensor, branch: str, adapter_name: str) -> torch.Tensor:
        """What one adapter adds to embeddings of a branch; (..., d), in the adapter's dtype."""
        activation, dropout = self.settings[adapter_name]
        gate, down = getattr(self, GATE + branch)[adapter_name], getattr(self, DOWN + branch)[adapter_name]
        dropout = dropout if self.training else 0.0
        return gated_product(x, gate, down, self.crome_up[adapter_name], activation, dropout)

    def _nothing_to_do(self, *args: Any, **kwargs: Any) -> None:
        """The sites do it; these weights only serve them."""

    merge = unmerge = _move_adapter_to_device_of_base_layer = _nothing_to_do


class CromeLayer(Mergeable):
    """Wraps one site: a module that produces embeddings of the language model's width.

    The site may return a tensor, a list or tuple of tensors, or a ModelOutput; the container is kept. Unknown public
    attributes are handed on to the wrapped module.

    Attributes:
        branches_of: adapter name -> the branches that this site feeds in it, each with the half-open ranges of token
            ids that are its own; no ranges: all other tokens, which is the one branch of any site but a table that
            holds image tokens as well.
        placeholders: token ids that a table leaves as they are. The model puts images in their place, and finds them
            by comparing embeddings bit for bit where it is given no ids; a product may round one row unlike many.
    """

    other_param_names = ("branches_of",)  # deleted with an adapter; the weights are `CromeWeights`'

    def __init__(self, base_layer: nn.Module, weights: CromeWeights, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._weights = (weights,)  # in a tuple: referred to, not registered a second time
        weights.sites += 1
        self.branches_of: dict[str, dict[str, TokenRanges]] = {}
        self.placeholders: tuple[int, ...] = ()
        widths = (getattr(base_layer, name, None) for name in ("in_features", "num_embeddings"))
        self.in_features = next((width for width in widths if isinstance(width, int)), hidden_size)
        self.out_features = hidden_size
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: list[nn.Parameter] = []  # in a list: a merged model's state_dict has one table
        self._merge_names: list[str] = []  # what a site that cannot fold goes on with while the others are merged

    @property
    def branches(self) -> dict[str, TokenRanges]:
        """The branches that this site feeds in any adapter."""
        found: dict[str, TokenRanges] = {}
        for own in self.branches_of.values():
            for branch, ranges in own.items():
                found[branch] = [*dict.fromkeys([*found.get(branch, []), *ranges])]
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay with their owner: accelerate would take the wrapped module's hooks for ours.
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self._weights[0] if name.startswith("crome_") else self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the active adapters added; same container, shapes and dtype."""
        if self.disable_adapters and (self.merged or self._merge_names):
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        input_ids = next(iter([*args, *kwargs.values()]), None)
        if (calls := self._weights[0].rows) is not None and (rows := calls.here()) is not None:
            return rows.adapt(self, output, input_ids)
        names = self._own(self._merge_names or self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return output
        adapted = self.adapt(output, names, input_ids)
        if self._weights[0].observer is not None and not torch.compiler.is_compiling():
            self._weights[0].observer.see(self, names, input_ids, adapted)
        return adapted

    def acts(self) -> bool:
        """Whether this site adds an adapter now."""
        return not self.disable_adapters and not self.merged and bool(self._own(self.active_adapters))

    def adapt(self, output: Any, adapter_names: list[str], input_ids: torch.Tensor | None = None) -> Any:
        """Add the adapters to the embeddings in `output`, whatever container holds them.

        Args:
            input_ids: what a table was called with; read where the branch depends on the token.
        """
        return map_embeddings(output, self.out_features, lambda x: self._adapt(x, adapter_names, input_ids))

    def _adapt(self, x: torch.Tensor, adapter_names: list[str], input_ids: torch.Tensor | None) -> torch.Tensor:
        """y = x + the sum of what the adapters add; (..., d), in x's dtype."""
        by_id = bool(self.placeholders) or any(self.branches.values())
        ids = input_ids.to(x.device) if by_id and input_ids is not None else None
        y = x
        for name in adapter_names:
            added: Any = 0.0
            for branch, ranges in sorted(
                self.branches_of[name].items(), key=lambda item: len(item[1])
            ):  # others first
                part = self._weights[0](x, branch, name)
                added = torch.where(in_ranges(ids, ranges)[..., None], part, added) if ranges else part
            y = y + added  # type promotion keeps the sum in the wider dtype
        if self.placeholders and ids is not None:
            held = in_ranges(ids, [(token, token + 1) for token in self.placeholders])
            y = torch.where(held[..., None], x, y)
        return y.to(x.dtype)

    def _get_available_adapters(self) -> set[str]:
        return set(self.branches_of)

    def _own(self, adapter_names: Iterable[str]) -> list[str]:
        return [name for name in adapter_names if name in self.branches_of]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A projector has no weight of its own, and an identity no parameter at all: it keeps the adapter where it is.
        parameter = next((p for p in self.base_layer.parameters() if not p.is_meta), None)
        target = device or (parameter.device if parameter is not None else None)
        branches = self.branches_of.get(adapter_name, {})
        names = [kind + branch for branch in branches for kind in (GATE, DOWN)]
        if self._weights[0].branches_of(adapter_name)[:1] == list(branches)[:1]:
            names.append("crome_up")  # shared, so it follows one branch
        linears = self._weights[0].linears_of(adapter_name)
        for linear in (linears[name] for name in names if name in linears):
            if target is not None and not linear.weight.is_meta:
                linear.to(target)
