"""Take attachments away: one that failed, and what an earlier one left on the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...backbone.model import replace_everywhere
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


def take_away_old(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Make room for an adapter, as PEFT's other methods do when they get a model a second time.

    An adapter of that name is removed, whatever its size and sites. So are weights without a site, which another
    method left when it unloaded the sites.

    Returns:
        What was removed, for `roll_back`; empty if nothing was.
    """
    weights: Any = model._modules.get(NAME)
    layers = [layer for _, layer in crome_layers(model)]
    if weights is not None and not layers:
        disarm(model)
        take_weights_off(model)
    if not layers or adapter_name not in weights.crome_up:
        return {}
    linears = weights.linears_of(adapter_name)
    for name in linears:  # `delete_adapter` would warn that another one is active now
        del getattr(weights, name)[adapter_name]
    branches = {layer: layer.branches_of.pop(adapter_name) for layer in layers if adapter_name in layer.branches_of}
    settings, active = weights.settings[adapter_name], weights._active_adapter
    return {"linears": linears, "branches": branches, "settings": settings, "active": active}


def roll_back(model: nn.Module, adapter_name: str, old: dict[str, Any]) -> None:
    """Restore a model after an attachment that failed.

    Args:
        old: the result of `take_away_old`.
    """
    weights: Any = model._modules.get(NAME)
    if weights is None:
        return
    weights.delete_adapter(adapter_name)
    layers: list[CromeLayer] = [layer for _, layer in crome_layers(model)]
    for layer in layers:
        layer.branches_of.pop(adapter_name, None)
        if layer in old.get("branches", {}):
            layer.branches_of[adapter_name] = old["branches"][layer]
        if not layer.branches_of:
            replace_everywhere(model, layer, layer.base_layer)
    if not any(layer.branches_of for layer in layers):
        disarm(model)
        take_weights_off(model)
    elif old:
        for name, linear in old["linears"].items():
            getattr(weights, name)[adapter_name] = linear
        weights.settings[adapter_name] = old["settings"]
        weights._active_adapter = old["active"]
