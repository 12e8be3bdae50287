"""Taking attachments away: one that failed, and what an earlier one left on the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .backbone import replace_everywhere
from .guard import disarm


def take_away_old(model: nn.Module, child: str, adapter_name: str, layer_cls: type[nn.Module]) -> dict[str, Any]:
    """Make room for an adapter, as PEFT's other methods do where a model comes to them a second time.

    An adapter of that name goes, whatever its size; so do weights that no site refers to, which another method's
    `merge_and_unload` left when it unloaded the sites.

    Args:
        child: of the model, that holds the weights.
        layer_cls: of the sites.
    Returns:
        What was there, for `roll_back`; empty where there was nothing.
    """
    weights: Any = getattr(model, child, None)
    if weights is None:
        return {}
    if not any(isinstance(module, layer_cls) for module in model.modules()):
        disarm(weights)
        delattr(model, child)
        return {}
    if adapter_name not in weights.crome_up:
        return {}
    old = {name: getattr(weights, name)[adapter_name] for name in weights.adapter_layer_names}
    for name in old:  # not by `delete_adapter`, which would say that another one is active now
        del getattr(weights, name)[adapter_name]
    return {"linears": old, "settings": weights.settings[adapter_name], "active": weights._active_adapter}


def roll_back(
    model: nn.Module, child: str, adapter_name: str, layer_cls: type[nn.Module], first: bool, old: dict[str, Any]
) -> None:
    """Leave a model as it was before an attachment that failed.

    Args:
        child, layer_cls: as in `take_away_old`.
        first: whether the model had no sites before.
        old: of `take_away_old`.
    """
    weights: Any = getattr(model, child, None)
    if weights is not None:
        weights.delete_adapter(adapter_name)
    if first:
        for module in [module for module in model.modules() if isinstance(module, layer_cls)]:
            replace_everywhere(model, module, module.base_layer)  # type: ignore[arg-type]
        if weights is not None:
            delattr(model, child)
    elif old:
        for name, linear in old["linears"].items():
            getattr(weights, name)[adapter_name] = linear
        weights.settings[adapter_name] = old["settings"]
        weights._active_adapter = old["active"]
