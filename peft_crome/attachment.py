"""Taking attachments away: one that failed, and what an earlier one left on the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .backbone import replace_everywhere
from .guard import disarm


def take_away_old(model: nn.Module, child: str, adapter_name: str, layer_cls: type[nn.Module]) -> dict[str, Any]:
    """Make room for an adapter, as PEFT's other methods do where a model comes to them a second time.

    An adapter of that name goes, whatever its size and its sites; so do weights that no site refers to, which another
    method's `merge_and_unload` left when it unloaded the sites.

    Args:
        child: of the model, that holds the weights.
        layer_cls: of the sites.
    Returns:
        What was there, for `roll_back`; empty where there was nothing.
    """
    weights: Any = model._modules.get(child)
    if weights is None:
        return {}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, layer_cls)]
    if not layers:
        disarm(model)
        del model._modules[child]
        return {}
    if adapter_name not in weights.crome_up:
        return {}
    linears = weights.linears_of(adapter_name)
    for name in linears:  # not by `delete_adapter`, which would say that another one is active now
        del getattr(weights, name)[adapter_name]
    branches = {layer: layer.branches_of.pop(adapter_name) for layer in layers if adapter_name in layer.branches_of}
    settings, active = weights.settings[adapter_name], weights._active_adapter
    return {"linears": linears, "branches": branches, "settings": settings, "active": active}


def roll_back(
    model: nn.Module, child: str, adapter_name: str, layer_cls: type[nn.Module], old: dict[str, Any]
) -> None:
    """Leave a model as it was before an attachment that failed.

    Args:
        child, layer_cls: as in `take_away_old`.
        old: of `take_away_old`.
    """
    weights: Any = model._modules.get(child)
    if weights is not None:
        weights.delete_adapter(adapter_name)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, layer_cls)]
    for layer in layers:
        layer.branches_of.pop(adapter_name, None)
        if layer in old.get("branches", {}):
            layer.branches_of[adapter_name] = old["branches"][layer]
        if not layer.branches_of:
            replace_everywhere(model, layer, layer.base_layer)
            weights.sites -= 1
    if weights is not None and not weights.sites:
        disarm(model)
        del model._modules[child]
    elif old:
        for name, linear in old["linears"].items():
            getattr(weights, name)[adapter_name] = linear
        weights.settings[adapter_name] = old["settings"]
        weights._active_adapter = old["active"]
