"""Measure what an adapter does on one input: gates, the change of each embedding, units that add nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    records: dict[tuple[str, str], _Record] = {}
    recording = _recording(model, layers, names[0], batch, records)
    with evaluating(model), recording, torch.random.fork_rng(devices=[]):
        model(**batch)
    return [record.report(branch, site) for (branch, site), record in records.items() if record.tokens]


@contextmanager
def _recording(
    model: nn.Module,
    layers: list[tuple[str, CromeLayer]],
    adapter_name: str,
    batch: dict[str, Any],
    records: dict[tuple[str, str], _Record],
) -> Iterator[None]:
    """Put hooks on the sites and their wrapped modules for a forward pass."""
    base_outputs: dict[str, Any] = {}  # site -> output of the wrapped module
    handles = []
    held = placeholder_ids(model)

    def keep(site: str) -> Any:
        return lambda module, args, output: base_outputs.__setitem__(site, output)

    def see(site: str) -> Any:
        def hook(layer: CromeLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = next(iter([*args, *kwargs.values()]), None)
            for x in embeddings_in(base_outputs.pop(site), layer.out_features):
                ids = first if _is_ids(first, x) else None
                for branch in layer.branches_of[adapter_name]:
                    record = records.setdefault((branch, site), _Record())
                    record.add(layer, branch, adapter_name, x, ids, _counts(layer, branch, x, ids, batch, held))

        return hook

    for site, layer in layers:
        handles.append(layer.base_layer.register_forward_hook(keep(site)))
        handles.append(layer.register_forward_hook(see(site), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

    gates: list[torch.Tensor] = field(default_factory=list)
    embeddings: list[torch.Tensor] = field(default_factory=list)
    changes: list[torch.Tensor] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    peaks: torch.Tensor | None = None
    squares: float = 0.0
    tokens: int = 0
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
        gate, hidden = (
            values.float()
            for values in gate_and_hidden(
                kept, maps[GATE + branch], maps[DOWN + branch], weights.settings[adapter_name][0]
            )
        )
        up = maps["crome_up"].weight.to(x.device).float()
        added = hidden.abs() * up.norm(dim=0)  # (tokens, m): norm of each unit's addition
        self.positions.append((counts.flatten().nonzero().flatten() + self.passed).cpu())
        self.passed += counts.numel()
        if not len(kept):
            return
        self.gates.append(gate.abs().mean(-1).cpu())
        self.embeddings.append(kept.float().norm(dim=-1).cpu())
        self.changes.append((hidden @ up.T).norm(dim=-1).cpu())
        if ids is not None:
            self.ids.append(ids[counts.to(ids.device)].cpu())
        peaks = added.amax(0).cpu()
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)
        self.squares += float(added.square().sum())
        self.tokens += len(kept)

    def report(self, branch: str, site: str) -> BranchActivity:
        """Build the activity from the collected tokens."""
        assert self.peaks is not None
        return BranchActivity(
            branch=branch,
            site=site,
            gate=torch.cat(self.gates),
            embedding_norm=torch.cat(self.embeddings),
            change_norm=torch.cat(self.changes),
            unit_peaks=self.peaks,
            unit_rms=(self.squares / (self.tokens * self.peaks.numel())) ** 0.5,
            token_ids=torch.cat(self.ids) if self.ids else None,
            positions=torch.cat(self.positions),
        )
