"""Measure what an adapter does on one input: gates, the change of each embedding, units that add nothing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..backbone.model import placeholder_ids
from ..backbone.modes import evaluating
from ..backbone.outputs import embeddings_in
from ..tuner.bottleneck import gate_and_hidden
from ..tuner.branches import in_ranges
from ..tuner.layer import CromeLayer, crome_layers
from ..tuner.weights import DOWN, GATE

SILENT = 1e-2  # share of the root mean square over units and tokens


@dataclass(frozen=True, eq=False)
class BranchActivity:
    """One branch's activity at one site, with a number for each token in the order of the site's output.

    Attributes:
        branch: the branch's name.
        site: full path of the wrapped module.
        gate: (tokens,), mean over the hidden units of |act(x W_g)|.
        embedding_norm: (tokens,), norm of the site's embedding.
        change_norm: (tokens,), norm of the branch's addition to it.
        unit_peaks: (m,), the largest norm that each hidden unit added to a token.
        unit_rms: root mean square over units and tokens of a unit's addition.
        token_ids: (tokens,), ids that a table looked up; None: the site reads no ids.
        positions: (tokens,), each token's place among all embeddings of the site; image placeholders leave gaps.
    """

    branch: str
    site: str
    gate: torch.Tensor
    embedding_norm: torch.Tensor
    change_norm: torch.Tensor
    unit_peaks: torch.Tensor
    unit_rms: float
    token_ids: torch.Tensor | None
    positions: torch.Tensor

    @property
    def relative_change(self) -> torch.Tensor:
        """(tokens,), the change's norm as a share of the embedding's; 0 if the latter is 0."""
        return torch.where(self.embedding_norm > 0, self.change_norm / self.embedding_norm, 0.0)

    @property
    def silent_units(self) -> tuple[int, ...]:
        """The hidden units that added to no token more than `SILENT` of `unit_rms`."""
        return tuple((self.unit_peaks <= SILENT * self.unit_rms).nonzero().flatten().tolist())


@torch.no_grad()
def inspect_activity(model: nn.Module, batch: dict[str, Any]) -> list[BranchActivity]:
    """Run one batch forward and measure what the active adapter adds. The model is unchanged.

    Padding and image placeholders are left out.

    Args:
        model: a model with one active CROME adapter that is not merged.
        batch: the arguments of `model(**batch)`.
    Returns:
        An entry for each branch and site that embeddings passed through.
    Raises:
        ValueError: no adapter is active, several are, or one is merged.
    """
    layers = [(path, layer) for path, layer in crome_layers(model) if layer.acting()]
    if not layers:
        merged = any(layer.merged for _, layer in crome_layers(model))
        remedy = "Unmerge it: model.unmerge_adapter()." if merged else "Activate it: model.set_adapter('default')."
        raise ValueError(f"{type(model).__name__} has no active CROME adapter. {remedy}")
    names = list(layers[0][1].active_adapters)
    if len(names) > 1 or any(layer.merged for _, layer in crome_layers(model)):
        raise ValueError(
            f"The adapters {names} are active, or some are merged; expected one, not merged. Write "
            f"model.set_adapter({names[0]!r}), and model.unmerge_adapter() where one is merged."
        )
    records: dict[tuple[str, str], _Record] = defaultdict(_Record)  # by branch and site
    held = placeholder_ids(model)

    def see(site: str, layer: CromeLayer, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        first = next(iter([*args, *kwargs.values()]), None)
        for x in embeddings_in(output, layer.out_features):
            ids = first if _is_ids(first, x) else None
            for branch in layer.branches_of[names[0]]:
                counts = _counts(layer, branch, x, ids, batch, held)
                records[branch, site].add(layer, branch, names[0], x, ids, counts)

    # A site passes its arguments on, so the wrapped module has all that the site reads.
    handles = [
        layer.base_layer.register_forward_hook(partial(see, site, layer), with_kwargs=True) for site, layer in layers
    ]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [record.report(branch, site) for (branch, site), record in records.items() if record.parts]


def _is_ids(value: Any, x: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.shape == x.shape[:-1]


def _counts(
    layer: CromeLayer,
    branch: str,
    x: torch.Tensor,
    ids: torch.Tensor | None,
    batch: dict[str, Any],
    held: tuple[int, ...],
) -> torch.Tensor:
    """Mark the embeddings that belong to the branch and stay in the sequence; bool, of the shape of x without d."""
    counts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if ids is None:
        return counts
    ranges = layer.branches[branch]
    others = [r for other, other_ranges in layer.branches.items() if other != branch for r in other_ranges]
    if ranges:
        counts &= in_ranges(ids, ranges)
    elif others:
        counts &= ~in_ranges(ids, others)
    mask, asked = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None and mask.shape == ids.shape and asked is not None and asked.shape == ids.shape:
        counts &= mask.to(counts.device).bool()
    # A model may look up another token at an image placeholder, so the batch's ids count as well.
    for tokens in (ids, asked):
        if held and not ranges and tokens is not None and tokens.shape == ids.shape:
            counts &= ~torch.isin(tokens.to(counts.device), torch.tensor(held, device=counts.device))
    return counts


@dataclass
class _Record:
    """Collect one branch's tokens at one site over the calls of a forward pass."""

    parts: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    squares: float = 0.0
    passed: int = 0  # includes tokens that do not count

    def add(
        self,
        layer: CromeLayer,
        branch: str,
        adapter_name: str,
        x: torch.Tensor,
        ids: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> None:
        """Note one call: x is (..., d); ids and counts have its shape without d."""
        weights = layer._weights[0]
        maps = weights.linears_of(adapter_name)
        kept = x[counts]
        activation, _ = weights.settings[adapter_name]
        both = gate_and_hidden(kept, maps[GATE + branch], maps[DOWN + branch], activation)
        gate, hidden = (values.float() for values in both)
        up = maps["crome_up"].weight.to(x.device).float()
        added = hidden.abs() * up.norm(dim=0)  # (tokens, m): norm of each unit's addition
        first, self.passed = self.passed, self.passed + counts.numel()
        if not len(kept):
            return
        part = {
            "gate": gate.abs().mean(-1),
            "embedding_norm": kept.float().norm(dim=-1),
            "change_norm": (hidden @ up.T).norm(dim=-1),
            "positions": counts.flatten().nonzero().flatten() + first,
            "unit_peaks": added.amax(0, keepdim=True),
        }
        if ids is not None:
            part["token_ids"] = ids[counts.to(ids.device)]
        for name, value in part.items():
            self.parts[name].append(value.cpu())
        self.squares += float(added.square().sum())

    def report(self, branch: str, site: str) -> BranchActivity:
        """Build the activity from the collected tokens."""
        values: dict[str, Any] = {name: torch.cat(parts) for name, parts in self.parts.items()}
        peaks = values.pop("unit_peaks").amax(0)
        rms = (self.squares / (len(values["gate"]) * peaks.numel())) ** 0.5
        values.setdefault("token_ids", None)
        return BranchActivity(branch=branch, site=site, unit_peaks=peaks, unit_rms=rms, **values)
