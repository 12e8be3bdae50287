"""The wrapper that adds adapters to the embeddings that a module returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..backbone.outputs import map_embeddings
from .branches import TokenRanges, in_ranges, united
from .merging.merge import Mergeable
from .weights import DOWN, GATE, CromeWeights, Stack


class CromeLayer(Mergeable):
    """Wrap one site: a module that produces embeddings of the language model's width.

    The site may return a tensor, a list or tuple of tensors, or a ModelOutput; the container is kept. Names that begin
    with `crome_` are looked up in the weights, other unknown public names in the wrapped module.

    Attributes:
        branches_of: adapter name -> branch -> half-open ranges of token ids. No ranges: all tokens that are not in
            another branch. Only an embedding table that holds image tokens as well has ranges.
        placeholders: ids of image placeholders, whose embeddings a table does not change. Some models find them by
            comparing embeddings bit for bit, and a product may round a single row differently from many.
    """

    other_param_names = ("branches_of",)  # deleted with an adapter; the weights are `CromeWeights`'

    def __init__(self, base_layer: nn.Module, weights: CromeWeights, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._weights = (weights,)  # in a tuple, so that it is not registered twice
        self.branches_of: dict[str, dict[str, TokenRanges]] = {}
        self.placeholders: tuple[int, ...] = ()
        self.out_features = hidden_size
        self.merged_adapters: list[str] = []
        self._unmerged: list[nn.Parameter] = []  # the table before a merge; a list is not saved

    @property
    def in_features(self) -> int:
        """Width of the wrapped module's input, or the number of a table's rows, which a resized vocabulary changes."""
        widths = (getattr(self.base_layer, name, None) for name in ("in_features", "num_embeddings"))
        return next((width for width in widths if isinstance(width, int)), self.out_features)

    @property
    def branches(self) -> dict[str, TokenRanges]:
        """The branches that this site feeds in any adapter."""
        return united(self.branches_of.values())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names are not forwarded: accelerate would take the wrapped module's hooks for the layer's.
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self._weights[0] if name.startswith("crome_") else self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped module's output with the active adapters added; same container, shapes and dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        input_ids = next(iter([*args, *kwargs.values()]), None)
        weights = self._weights[0]
        if (override := weights.override) is not None and (other := override(self, output, input_ids)) is not None:
            return other
        if not (names := self.acting()):
            return output
        adapted = self.adapt(output, names, input_ids)
        if weights.observer is not None and not torch.compiler.is_compiling():
            weights.observer.see(self, names, input_ids, adapted)
        return adapted

    def acting(self) -> list[str]:
        """The adapters that this site adds now; none if they are disabled or folded into its table."""
        names = self._attached(self.merged_adapters or self.active_adapters)
        return [] if self.disable_adapters or self.folded else names

    def adapt(self, output: Any, adapter_names: list[str], input_ids: torch.Tensor | None = None) -> Any:
        """Add the adapters to the embeddings in `output`, whatever container holds them.

        Args:
            input_ids: The ids that a table was called with. They are read if the branch depends on the token.
        """
        return map_embeddings(output, self.out_features, lambda x: self._adapt(x, adapter_names, input_ids))

    def _adapt(
        self, x: torch.Tensor, adapter_names: list[str], input_ids: torch.Tensor | None, stack: Stack | None = None
    ) -> torch.Tensor:
        """Add what the adapters compute to x; (..., d), in x's dtype.

        Args:
            stack: see `CromeWeights.forward`.
        """
        by_id = bool(self.placeholders) or any(self.branches.values())
        ids = input_ids.to(x.device) if by_id and input_ids is not None else None
        y = x
        for name in adapter_names:
            added: Any = 0.0
            branches = self.branches_of[name].items()
            for branch, ranges in sorted(branches, key=lambda item: len(item[1])):  # branches without ranges first
                part = self._weights[0](x, branch, name, stack)
                added = torch.where(in_ranges(ids, ranges)[..., None], part, added) if ranges else part
            y = y + added  # type promotion keeps the sum in the wider dtype
        if self.placeholders and ids is not None:
            held = in_ranges(ids, [(token, token + 1) for token in self.placeholders])
            y = torch.where(held[..., None], x, y)
        return y.to(x.dtype)

    def _get_available_adapters(self) -> set[str]:
        return set(self.branches_of)

    def _attached(self, adapter_names: Iterable[str]) -> list[str]:
        return [name for name in adapter_names if name in self.branches_of]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A projector may have no weight, and an identity no parameter: then the adapter stays where it is.
        target = device or next((p.device for p in self.base_layer.parameters() if not p.is_meta), None)
        weights, branches = self._weights[0], list(self.branches_of.get(adapter_name, {}))
        names = [kind + branch for branch in branches for kind in (GATE, DOWN)]
        names += ["crome_up"] if weights.branches_of(adapter_name)[0] in branches else []  # shared: follows one branch
        for name, linear in weights.linears_of(adapter_name).items():
            if name in names and target is not None and not linear.weight.is_meta:
                linear.to(target)


def crome_layers(model: nn.Module) -> Iterator[tuple[str, CromeLayer]]:
    """Yield path and layer of every site."""
    for path, module in model.named_modules():
        if isinstance(module, CromeLayer):
            yield path, module
