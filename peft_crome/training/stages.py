"""The paper's three stages, and what trains in each. All other facts about stages are derived from this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..tuner import guard
from ..tuner.layer import crome_layers

ADAPTER = "adapter"  # the crome_* weights; the other parts are modules of the composite


@dataclass(frozen=True)
class Stage:
    """A stage and what trains in it, beside frozen backbones.

    Args:
        name: the name in a recipe.
        parts: "adapter", and modules of the composite. A composite without a Q-Former lacks some of them.
        previous: stages whose directory this one can start from. An empty tuple means that it starts from backbones.
        purpose: one line for people.
    """

    name: str
    parts: tuple[str, ...]
    previous: tuple[str, ...]
    purpose: str


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", ("image_projection", "text_projection", ADAPTER), (), "align images with text, on captions"),
        Stage(
            "instruct",
            ("image_projection", "text_projection", "qformer", ADAPTER),
            ("pretrain", "instruct"),
            "follow instructions about images",
        ),
        Stage("finetune", (ADAPTER,), ("pretrain", "instruct", "finetune"), "learn one task by the adapter"),
    )
}


PARTS = {part for stage in STAGES.values() for part in stage.parts}


def modules_to_save(stage: Stage, composite: nn.Module) -> list[str]:
    """List the modules of this composite that a stage trains in full, for PEFT's `modules_to_save`."""
    return [part for part in stage.parts if part != ADAPTER and getattr(composite, part, None) is not None]


def part_of(parameter_name: str) -> str:
    """Return the part that a trained parameter belongs to: the adapter, or the module that trains in full.

    Example:
        >>> part_of("base_model.model.image_projection.modules_to_save.default.weight")
        'image_projection'
        >>> part_of("base_model.model.crome.crome_up.default.weight")
        'adapter'
    """
    words = parameter_name.split(".")
    if any(word.startswith("crome_") for word in words):
        return ADAPTER
    if "modules_to_save" in words:
        return words[words.index("modules_to_save") - 1]
    return next((word for word in words if word in PARTS), "backbones")


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield part, name and value of every parameter that trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield part_of(name), name, parameter


def count_trained(model: nn.Module) -> dict[str, int]:
    """Count the weights that train by part, in the order of the model."""
    counts: dict[str, int] = {}
    for part, _, parameter in trained_parameters(model):
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def media_that_teach(model: nn.Module) -> set[str] | None:
    """Return the kinds of media that reach trained weights; None: words reach some, so every row teaches something."""
    sites = {f"{path}.": layer.branches for path, layer in crome_layers(model) if "text" not in layer.branches}
    reached = guard.learns_from(model)  # by the adapter; the other parts of a stage make image tokens
    for part, name, _ in trained_parameters(model):
        if part not in PARTS:
            inside = [branches for path, branches in sites.items() if name.startswith(path)]
            reached |= {branch if branch == "audio" else "vision" for branch in inside[0]} if inside else {"text"}
    if "text" in reached:
        return None
    return ({"audio"} & reached) | ({"image", "video"} if "vision" in reached else set())
