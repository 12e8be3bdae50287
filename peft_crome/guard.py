"""A guard against the adapter that does nothing: is every branch reached, and can its weights learn?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .containers import embeddings_in
from .tuner.layer import CromeLayer, CromeWeights, in_ranges

TEXT_INPUTS = re.compile(r"(decoder_)?input_ids")
AUDIO_INPUTS = re.compile(r".*(audio|speech|input_features|input_values).*")
VISION_INPUTS = re.compile(r".*(pixel_values|image|video|vision|patches).*")


@dataclass(frozen=True)
class SiteReport:
    """What a forward pass sent through one site for one branch.

    Attributes:
        branch: the branch's name.
        site: full path of the wrapped module.
        calls: how often the site ran.
        embeddings: how many embeddings it adapted in all.
        gradient: whether the loss depends on them, so that the branch's weights can learn.
    """

    branch: str
    site: str
    calls: int
    embeddings: int
    gradient: bool


@dataclass
class Watch:
    """Records what passes through the sites while it is a model's `CromeWeights.watch`.

    Args:
        guards: it stands for one forward pass in training, and `_after` takes it off.
    """

    guards: bool = False
    calls: dict[tuple[CromeLayer, str], int] = field(default_factory=dict)
    embeddings: dict[tuple[CromeLayer, str], int] = field(default_factory=dict)
    nodes: dict[tuple[CromeLayer, str], list[Any]] = field(default_factory=dict)

    def see(self, layer: CromeLayer, input_ids: Any, output: Any) -> None:
        """Note one call of a site and where in autograd's graph its output stands."""
        tensors = list(embeddings_in(output, layer.out_features))
        for branch, ranges in layer.branches.items():
            total = sum(x[..., 0].numel() for x in tensors)
            others = [r for other, given in layer.branches.items() if other != branch for r in given]
            if ranges:
                total = int(in_ranges(input_ids, ranges).sum())
            elif others:
                total -= int(in_ranges(input_ids, others).sum())
            key = (layer, branch)
            self.calls[key] = self.calls.get(key, 0) + 1
            self.embeddings[key] = self.embeddings.get(key, 0) + total
            self.nodes.setdefault(key, []).extend(x.grad_fn for x in tensors if total and x.grad_fn is not None)

    def report(self, model: nn.Module, outputs: Any) -> list[SiteReport]:
        """One row per site and branch, whether it was reached or not."""
        wanted = {node for nodes in self.nodes.values() for node in nodes}
        found = _reachable(wanted, _roots(outputs))
        rows = []
        for path, layer in crome_layers(model):
            for branch in layer.branches:
                key = (layer, branch)
                learns = any(node in found for node in self.nodes.get(key, []))
                rows.append(
                    SiteReport(branch, path, self.calls.get(key, 0), self.embeddings.get(key, 0), gradient=learns)
                )
        return rows


def check(model: nn.Module, batch: dict[str, Any]) -> list[SiteReport]:
    """Run one batch forward and see that each branch with input in it is reached and can learn; changes nothing.

    Args:
        model: a model with an active CROME adapter.
        batch: what `model(**batch)` takes, with labels if the model has a loss.
    Returns:
        A row per site and branch.
    Raises:
        ValueError: there is no active CROME adapter.
        RuntimeError: a branch is not reached, or its weights get no gradient; the message names branch and sites.
    """
    weights = next((module for module in model.modules() if isinstance(module, CromeWeights)), None)
    layers = [layer for _, layer in crome_layers(model)]
    if weights is None or not any(layer.acts() for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no active CROME adapter. Attach one: get_peft_model(model, CromeConfig()), "
            "or activate it: model.set_adapter('default')."
        )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout, no statistics
    weights.watch = watch = Watch()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            outputs = model(**batch)
        rows = watch.report(model, outputs)
    finally:
        weights.watch = None
        for module, training in modes:
            module.training = training
    expected = expected_branches({row.branch for row in rows}, batch, from_pictures(model))
    verify(rows, expected, learning=trains(weights))
    return rows


def verify(rows: Iterable[SiteReport], expected: set[str], learning: bool) -> None:
    """Refuse a branch that had input and was not reached, or cannot learn.

    Raises:
        RuntimeError: names the branch, its sites and what to write.
    """
    for branch in sorted(expected):
        own = [row for row in rows if row.branch == branch]
        sites = [row.site for row in own]
        if not any(row.embeddings for row in own):
            raise RuntimeError(
                f"The CROME branch {branch!r} is not reached: the batch has input for it, and nothing went through "
                f"{sites}. Name the modules that produce these embeddings: CromeConfig(branches={{{branch!r}: "
                "['<module path>']})."
            )
        if learning and not any(row.gradient for row in own):
            raise RuntimeError(
                f"The CROME branch {branch!r} cannot learn: {sites} ran, and the loss does not depend on what came "
                "out. The model detaches it, or runs it under torch.no_grad(); name a later module: "
                f"CromeConfig(branches={{{branch!r}: ['<module path>']}})."
            )


def from_pictures(model: nn.Module) -> set[str]:
    """The branches that read pictures whatever they are called: behind a Q-Former, the text branch does.

    Its sites are fusion sites, which are identities, and no table of tokens.
    """
    sites: dict[str, list[nn.Module]] = {}
    for _, layer in crome_layers(model):
        for branch in layer.branches:
            sites.setdefault(branch, []).append(layer.get_base_layer())
    return {branch for branch, own in sites.items() if all(isinstance(module, nn.Identity) for module in own)}


def expected_branches(
    branches: Iterable[str], arguments: dict[str, Any], from_pictures: set[str] | None = None
) -> set[str]:
    """The branches that a forward call has input for: token ids, sound, or (for any other name) pictures."""
    given = {name for name, value in arguments.items() if _is_given(value)}
    expected = set()
    for branch in branches:
        if branch == "text" and branch not in (from_pictures or ()):
            names = TEXT_INPUTS if "inputs_embeds" not in given else None
        else:
            names = AUDIO_INPUTS if branch == "audio" else VISION_INPUTS
        if names and any(names.fullmatch(name) for name in given):
            expected.add(branch)
    return expected


def trains(weights: CromeWeights) -> bool:
    """Whether any of the adapters' weights is to be trained."""
    return any(parameter.requires_grad for parameter in weights.parameters())


def crome_layers(model: nn.Module) -> Iterator[tuple[str, CromeLayer]]:
    """Path and layer of every site."""
    for path, module in model.named_modules():
        if isinstance(module, CromeLayer):
            yield path, module


def arm(model: nn.Module, weights: CromeWeights) -> None:
    """Check the first forward passes in training mode, until each branch has been seen to act; then no more."""
    disarm(weights)
    weights.unproven = set(weights.branches)
    weights.guard = (
        model.register_forward_pre_hook(_before, with_kwargs=True),
        model.register_forward_hook(_after, with_kwargs=True, always_call=True),
    )


def disarm(weights: CromeWeights) -> None:
    """Take the guard off the model."""
    for handle in weights.guard:
        handle.remove()
    weights.guard = ()


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    weights = getattr(model, "crome", None)
    if torch.compiler.is_compiling() or not isinstance(weights, CromeWeights) or not weights.guard:
        return
    if getattr(model, "_is_replica", False):  # nn.DataParallel: sites refer to the first device's weights
        return
    layers = [layer for _, layer in crome_layers(model)]
    if model.training and torch.is_grad_enabled() and any(layer.acts() for layer in layers) and trains(weights):
        weights.watch = Watch(guards=True)


def _after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
    weights = getattr(model, "crome", None)
    if torch.compiler.is_compiling() or not isinstance(weights, CromeWeights) or not weights.watch:
        return
    if not weights.watch.guards:
        return
    watch, weights.watch = weights.watch, None
    if outputs is None:  # the forward pass failed: its own error is on its way
        return
    arguments = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    expected = expected_branches(weights.unproven, arguments, from_pictures(model))
    verify(watch.report(model, outputs), expected, learning=True)
    weights.unproven -= expected
    if not weights.unproven:
        disarm(weights)


def _is_given(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    return isinstance(value, (list, tuple)) and any(_is_given(item) for item in value)


def _roots(outputs: Any) -> list[Any]:
    """Where a backward pass may begin: the loss, else all that the model returns."""
    if isinstance(getattr(outputs, "loss", None), torch.Tensor):
        outputs = outputs.loss
    if isinstance(outputs, torch.Tensor):
        return [outputs.grad_fn] if outputs.grad_fn is not None else []
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (list, tuple)) else []
    return [node for value in values for node in _roots(value)]


def _reachable(wanted: set[Any], roots: list[Any]) -> set[Any]:
    """Which of the wanted nodes of autograd's graph lie behind the roots."""
    found: set[Any] = set()
    seen, stack = set(roots), list(roots)
    while stack and len(found) < len(wanted):
        node = stack.pop()
        if node in wanted:
            found.add(node)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found
