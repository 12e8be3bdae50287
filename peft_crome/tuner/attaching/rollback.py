"""Take attachments away: one that failed, and what an earlier one left on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..guard import disarm
from ..layer import CromeLayer, crome_layers
from ..weights import NAME, CromeWeights


def weights_on(model: nn.Module) -> CromeWeights:
    """Return the model's child that holds the weights, and create it if there is none."""
    # A compiled model reads and sets attributes in the module that it wraps.
    weights: Any = model._modules.setdefault(NAME, CromeWeights())
    if getattr(model, NAME, None) is not weights:
        model.__dict__[NAME] = weights  # `get_parameter` follows attributes
    return weights


def take_weights_off(model: nn.Module) -> None:
    """Undo `weights_on`."""
    del model._modules[NAME]
    model.__dict__.pop(NAME, None)


def make_room(model: nn.Module, adapter_name: str) -> None:
    """Remove an earlier adapter, as PEFT's other methods do when they get a model a second time.

    An adapter of that name is removed, whatever its size and sites. So are weights without a site, which another
    method left when it unloaded the sites.
    """
    weights: Any = model._modules.get(NAME)
    layers = [layer for _, layer in crome_layers(model)]
    if weights is not None and not layers:
        disarm(model)
        take_weights_off(model)
    elif weights is not None and adapter_name in weights.crome_up:
        for name in weights.linears_of(adapter_name):  # `delete_adapter` would warn that another one is active now
            del getattr(weights, name)[adapter_name]
        for layer in layers:
            layer.branches_of.pop(adapter_name, None)


def restore_point(model: nn.Module, *others: dict[str, Any]) -> Callable[[], None]:
    """Return a function that takes back what an attachment does to a model, and to dicts that it fills in."""
    modules = list(model.modules())
    ours = [module for module in modules if isinstance(module, (CromeLayer, CromeWeights))]
    dicts: list[Any] = [*others, vars(model), *(module._modules for module in modules)]
    dicts += [getattr(module, name) for module in ours for name in module.other_param_names]
    contents = [(each, dict(each)) for each in dicts]
    names = ("adapter_layer_names", "_active_adapter")
    attributes = [(module, name, getattr(module, name)) for module in ours for name in names]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for each, content in contents:
            for name in each.keys() - content.keys():
                del each[name]
            each.update(content)
        for module, name, value in attributes:
            setattr(module, name, value)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)

    return restore
