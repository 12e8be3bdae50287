"""Guard forward passes in training: each branch must act and learn, and a batch without images must not fail."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..backbone.model import COMPILED
from ..backbone.modes import trying
from ..backbone.outputs import embeddings_in
from .branches import in_ranges
from .layer import CromeLayer, crome_layers
from .weights import DOWN, GATE, CromeWeights

TEXT_INPUTS = re.compile(r"(decoder_)?input_ids")
AUDIO_INPUTS = re.compile(r".*(audio|speech|input_features|input_values).*")
VISION_INPUTS = re.compile(r".*(pixel_values|image|video|vision|patches).*")
CHECKPOINT = re.compile("checkpoint", re.IGNORECASE)  # a reentrant node does not lead to its closure
PATIENCE = 20  # training passes without input for any branch before a warning

Pair = tuple[str, str]  # adapter name, branch


@dataclass(frozen=True)
class SiteReport:
    """What passed through one site for one branch in a forward pass.

    Attributes:
        branch: the branch's name.
        site: full path of the wrapped module.
        calls: Number of times that the site ran.
        embeddings: Number of embeddings that it adapted in all.
        gradient: Whether the loss depends on them, so that the branch's weights can learn.
    """

    branch: str
    site: str
    calls: int
    embeddings: int
    gradient: bool


@dataclass(eq=False)
class Watch:
    """Record what passes through the sites while it is a model's `CromeWeights.observer`."""

    reached: set[Pair] = field(default_factory=set)
    # site, branch -> the number of embeddings in each call, and the places of these in autograd's graph
    calls: dict[tuple[CromeLayer, str], list[tuple[Any, list[Any]]]] = field(default_factory=dict)

    def see(self, layer: CromeLayer, adapter_names: list[str], input_ids: Any, output: Any) -> None:
        """Note one call of a site, and the place of its output in autograd's graph."""
        tensors = embeddings_in(output, layer.out_features)
        nodes = [x.grad_fn for x in tensors if x.grad_fn is not None]
        self.reached |= {(name, branch) for name in adapter_names for branch in layer.branches_of[name]}
        for branch, ranges in layer.branches.items():
            total: Any = sum(x[..., 0].numel() for x in tensors)
            others = [r for other, other_ranges in layer.branches.items() if other != branch for r in other_ranges]
            if ranges:
                total = in_ranges(input_ids, ranges).sum()
            elif others:
                total = total - in_ranges(input_ids, others).sum()
            self.calls.setdefault((layer, branch), []).append((total, nodes))

    def report(self, layers: Iterable[tuple[str, CromeLayer]], outputs: Any) -> list[SiteReport]:
        """Return one row per site and branch, whether the pass reached it or not."""
        wanted = {node for calls in self.calls.values() for _, nodes in calls for node in nodes}
        reachable = _reachable(wanted, _roots(outputs))
        rows = []
        for path, layer in layers:
            for branch in layer.branches:
                calls = self.calls.get((layer, branch), [])
                embeddings = int(sum(total for total, _ in calls))
                learns = embeddings > 0 and any(node in reachable for _, nodes in calls for node in nodes)
                rows.append(SiteReport(branch, path, len(calls), embeddings, gradient=learns))
        return rows


def check(model: nn.Module, batch: Mapping[str, Any]) -> list[SiteReport]:
    """Run one batch forward and check that each branch with input is reached and can learn. The model is unchanged.

    Args:
        model: model with an active CROME adapter.
        batch: arguments of `model(**batch)`, with labels if the model has a loss.
    Returns:
        A row for each site and branch.
    Raises:
        ValueError: the model has no active CROME adapter.
        RuntimeError: a branch is not reached, or its weights get no gradient. The message names the branch and its
            sites.
    """
    weights = next((module for module in model.modules() if isinstance(module, CromeWeights)), None)
    layers = list(crome_layers(model))
    if weights is None or not any(layer.acting() for _, layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no active CROME adapter. Attach one: get_peft_model(model, CromeConfig()), "
            "or activate it: model.set_adapter('default')."
        )
    weights.observer = watch = Watch()
    try:
        with trying(model), torch.enable_grad():  # hooks cannot watch the inside of a compiled graph
            outputs = model(**batch)
        rows = watch.report(layers, outputs)
    finally:
        weights.observer = None
    expected = expected_branches({branch for _, branch in acting(layers)}, batch, from_images(layers))
    verify(rows, expected, {branch for _, branch in training_pairs(weights, layers)})
    return rows


def verify(rows: Iterable[SiteReport], expected: set[str], training: set[str]) -> None:
    """Refuse a branch that had input and was not reached, or that trains and cannot learn.

    Args:
        expected: branches for which the batch has input.
        training: branches with weights that require a gradient.
    Raises:
        RuntimeError: names the branch, its sites and what to write.
    """
    for branch in sorted(expected):
        branch_rows = [row for row in rows if row.branch == branch]
        sites = [row.site for row in branch_rows]
        if not any(row.embeddings for row in branch_rows):
            raise RuntimeError(
                f"The CROME branch {branch!r} is not reached: the batch has input for it, and nothing went through "
                f"{sites}. Name the modules that produce these embeddings: CromeConfig(branches={{{branch!r}: "
                "['<module path>']})."
            )
        if branch in training and not any(row.gradient for row in branch_rows):
            raise RuntimeError(
                f"The CROME branch {branch!r} cannot learn: {sites} ran, and the loss does not depend on what came "
                "out. The model detaches it, or runs it under torch.no_grad(); name a later module: "
                f"CromeConfig(branches={{{branch!r}: ['<module path>']}})."
            )


def from_images(layers: Iterable[tuple[str, CromeLayer]]) -> set[str]:
    """Find the branches that read images under any name. Behind a Q-Former, the text branch does.

    The sites of such a branch are fusion sites, which are identities, and not a table of tokens.
    """
    fed: dict[bool, set[str]] = {True: set(), False: set()}  # whether a site is an identity -> its branches
    for _, layer in layers:
        fed[isinstance(layer.get_base_layer(), nn.Identity)].update(layer.branches)
    return fed[True] - fed[False]


def expected_branches(
    branches: Iterable[str], arguments: Mapping[str, Any], from_images: set[str] | None = None
) -> set[str]:
    """Find the branches for which a forward call has input: token ids, sound, or (for any other name) images.

    Sound and images are floating numbers, or codes (Inkling's audio_input_ids). Other integers with such a name are
    a mask, a count, a size or a position, which a batch without images may have as well.
    """
    inputs = {name for name, value in arguments.items() if _has_values(value)}
    media = {
        name
        for name in inputs
        if "mask" not in name and (name.endswith("input_ids") or _has_values(arguments[name], floating=True))
    }

    def has_input(branch: str) -> bool:
        if branch == "text" and branch not in (from_images or ()):
            return "inputs_embeds" not in inputs and any(map(TEXT_INPUTS.fullmatch, inputs))
        return any(map((AUDIO_INPUTS if branch == "audio" else VISION_INPUTS).fullmatch, media))

    return set(filter(has_input, branches))


def acting(layers: Iterable[tuple[str, CromeLayer]]) -> set[Pair]:
    """List the adapters that sites add now, with the branches that they feed."""
    return {(name, branch) for _, layer in layers for name in layer.acting() for branch in layer.branches_of[name]}


def training_pairs(weights: CromeWeights, layers: Iterable[tuple[str, CromeLayer]]) -> set[Pair]:
    """Select the pairs of `acting` in which W_u or a map of the branch requires a gradient."""
    return {pair for pair in acting(layers) if _requires_grad(weights, *pair)}


def learns_from(model: nn.Module) -> set[str]:
    """Return the kinds of input that train an adapter: "text", "audio", and "vision" for all that reads images."""
    weights = next(module for module in model.modules() if isinstance(module, CromeWeights))
    layers = list(crome_layers(model))
    branches = {branch for _, branch in training_pairs(weights, layers)}
    words = branches & {"text"} - from_images(layers)
    return words | branches & {"audio"} | ({"vision"} if branches - words - {"audio"} else set())


def _requires_grad(weights: CromeWeights, name: str, branch: str) -> bool:
    linears = weights.linears_of(name)
    return any(linears[key].weight.requires_grad for key in ("crome_up", GATE + branch, DOWN + branch))


class Guard:
    """Hooks on a model with CROME's sites for forward passes in training.

    The first pass with input for a branch proves that the branch acts and learns, or fails. A pass that does not
    reach a branch, because no row has an image, gives its weights a gradient of zero, which the optimizer, DDP and
    gradient accumulation wait for. Nothing else of the pass changes, so its loss is that of the base model. With
    modules that train beside the adapter, such a pass fails under DeepSpeed ZeRO-3.
    """

    def __init__(self, model: nn.Module, weights: CromeWeights) -> None:
        self.weights = weights
        self.layers = list(crome_layers(model))
        self.copies = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        self.from_images = from_images(self.layers)
        # Sites inside a compiled part of a host cannot be watched.
        seen = [layer for path, layer in self.layers if COMPILED not in path.split(".")]
        self.unproven = {branch for layer in seen for branch in layer.branches}
        self.patience = PATIENCE
        self.handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start to watch a forward pass in training."""
        if self._trains(model) and not self._is_compiled(model):
            self.weights.observer = Watch()

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """Prove branches that had input, and connect those that had none."""
        if self._is_compiled(model):  # nothing is watched; the outputs tell whether a branch ran
            if outputs is None or any(x.requires_grad for x in _tensors(outputs)) or not self._trains(model):
                return None
            return self._connected(outputs, training_pairs(self.weights, self.layers))
        watch, self.weights.observer = self.weights.observer, None
        # Without outputs the forward pass failed and is raising its error.
        if not isinstance(watch, Watch) or outputs is None or not self._trains(model):
            return None
        training = training_pairs(self.weights, self.layers)
        self._prove(watch, training, model, args, kwargs, outputs)
        missed = training - watch.reached
        return self._connected(outputs, missed) if missed else None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _is_compiled(self, model: nn.Module) -> bool:
        return torch.compiler.is_compiling() or COMPILED in model._modules

    def _trains(self, model: nn.Module) -> bool:
        replica = getattr(model, "_is_replica", False)  # nn.DataParallel: sites use the first device's weights
        return (
            model.training
            and torch.is_grad_enabled()
            and not replica
            and any(parameter.requires_grad for parameter in self.weights.parameters())
        )

    def _prove(
        self,
        watch: Watch,
        training: set[Pair],
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,
    ) -> None:
        branches = self.unproven & {branch for _, branch in training}
        merged = {
            branch
            for _, layer in self.layers
            if layer.folded
            for name in layer.merged_adapters
            for branch in layer.branches_of.get(name, ())
            if _requires_grad(self.weights, name, branch)
        } - branches
        if not branches and not merged & self.unproven:
            return
        arguments = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        expected = expected_branches({*branches, *merged}, arguments, self.from_images)
        if stopped := sorted(expected.intersection(merged)):
            raise RuntimeError(
                f"The CROME branches {stopped} do not train: they are merged into the embedding table. Write "
                "model.unmerge_adapter() before training."
            )
        if expected:
            verify(watch.report(self.layers, outputs), expected, expected)
            self.unproven -= expected
            self.patience = PATIENCE
        elif branches and not watch.reached and self.patience:
            self.patience -= 1
            if not self.patience:
                warnings.warn(
                    f"{PATIENCE} batches in training had no input for the CROME branches {sorted(branches)}, so "
                    f"nothing was trained. The model was given {sorted(arguments)}. If there should be images, see "
                    "that the collator returns them, and write TrainingArguments(remove_unused_columns=False).",
                    stacklevel=2,
                )

    def _connected(self, outputs: Any, missed: Collection[Pair]) -> Any:
        """Return the outputs with a zero gradient to the pairs' weights and to modules that train beside them."""
        zero: Any = 0.0
        for name, branch in sorted(missed):
            up = self.weights.crome_up[name].weight
            nothing = torch.zeros(0, self.weights.out_features, dtype=up.dtype, device=up.device)
            zero = zero + self.weights(nothing, branch, name).sum()  # the sum of no embeddings
        for parameter in (p for copy in self.copies for p in copy.parameters() if p.requires_grad):
            if not parameter.numel():
                raise RuntimeError(
                    f"A batch had no input for the CROME branches {sorted({branch for _, branch in missed})}. Under "
                    "DeepSpeed ZeRO-3, modules that train beside the adapter may then repeat their last gradient. Put "
                    "such input into every batch, or leave modules_to_save out."
                )
            zero = zero + parameter.flatten()[:0].sum().to(zero.device)
        return _plus(outputs, zero)


def arm(model: nn.Module, weights: CromeWeights) -> None:
    """Put a guard on a model, in place of an earlier one that knew fewer adapters."""
    disarm(model)
    Guard(model, weights)


def disarm(model: nn.Module) -> None:
    """Take the guard off a model."""
    for hook in list(model._forward_hooks.values()):
        if isinstance(guard := getattr(hook, "__self__", None), Guard):
            guard.remove()


def _plus(outputs: Any, zero: torch.Tensor) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs + zero.to(outputs) if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor):
                outputs[name] = _plus(value, zero)
    elif isinstance(outputs, tuple):
        return tuple(_plus(value, zero) if isinstance(value, torch.Tensor) else value for value in outputs)
    return outputs


def _tensors(outputs: Any) -> list[torch.Tensor]:
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _has_values(value: Any, *, floating: bool = False) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() > 0 and (value.is_floating_point() or not floating)
    return isinstance(value, (list, tuple)) and any(_has_values(item, floating=floating) for item in value)


def _roots(outputs: Any) -> list[Any]:
    """Return the start of a backward pass: the loss if there is one, else all that the model returns."""
    if isinstance(getattr(outputs, "loss", None), torch.Tensor):
        outputs = outputs.loss
    if isinstance(outputs, torch.Tensor):
        return [outputs.grad_fn] if outputs.grad_fn is not None else []
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (list, tuple)) else []
    return [node for value in values for node in _roots(value)]


def _reachable(wanted: set[Any], roots: list[Any]) -> set[Any]:
    """Find the wanted nodes of autograd's graph behind the roots; all of them if a node hides what it reads."""
    reached: set[Any] = set()
    seen, stack = set(roots), list(roots)
    hidden = False
    while stack and len(reached) < len(wanted):
        node = stack.pop()
        hidden = hidden or CHECKPOINT.search(node.name()) is not None
        if node in wanted:
            reached.add(node)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return wanted if hidden else reached
