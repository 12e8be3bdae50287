"""Check a model before an adapter changes it. These checks read module paths and widths only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...backbone.model import backbone_name, possible_widths, text_hidden_size
from ...sharing.weight_checks import Shapes, check_shapes, check_tensors
from ..branches import Branches, site_path
from ..weights import NAME, CromeWeights


def find_hidden_size(model: nn.Module, branches: Branches) -> int:
    """Find the language model's embedding width, and check every site against it.

    Raises:
        ValueError: the width is unknown, or a site has another width.
    """
    paths = {site: site_path(site) for sites in branches.values() for site in sites}
    widths = {site: possible_widths(model.get_submodule(path)) for site, path in paths.items()}
    hidden_size = text_hidden_size(model) or next((next(iter(w)) for w in widths.values() if len(w) == 1), None)
    if hidden_size is None:
        raise ValueError(
            f"The embedding width of {type(model).__name__} is unknown: it has no config with a hidden_size, and none "
            f"of {list(widths)} states its output width. Name a Linear or Embedding module in `branches`."
        )
    for branch, sites in branches.items():
        for site in sites:
            if widths[site] and hidden_size not in widths[site]:
                raise ValueError(
                    f"branches[{branch!r}]: {site!r} ({type(model.get_submodule(paths[site])).__name__}) has width "
                    f"{sorted(widths[site])}, the language model's is {hidden_size}. Name the module that maps into "
                    f"the language model: branches={{{branch!r}: ['<its projector>']}}."
                )
    return hidden_size


def check_names(model: nn.Module, adapter_name: str, shapes: Shapes) -> None:
    """Refuse names that are ambiguous: the adapter's in the keys of its file, and that of the child with the weights.

    Raises:
        ValueError: names what is taken and another name to write.
    """
    if not isinstance(model._modules.get(NAME, getattr(model, NAME, None)), (CromeWeights, type(None))):
        raise ValueError(f"{type(model).__name__} has an attribute {NAME!r} of its own, where CROME's weights go.")
    taken = {part for key in shapes for part in f"base_model.model.{NAME}.{key}".split(".")}
    no_folder = not adapter_name.strip() or re.search(r"[/\\\x00]", adapter_name)  # PEFT saves to a folder of its name
    if "." in adapter_name or no_folder or adapter_name in taken or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} has a dot or a slash, or is part of the weights' own names: a file could "
            "not tell adapters apart. Write adapter_name='default', or another word."
        )


def check_loaded(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are about to be loaded into an adapter and do not fit.

    Raises:
        ValueError: see `check_tensors` and `check_shapes`.
    """
    weights = next(module for module in model.modules() if isinstance(module, CromeWeights))
    check_tensors(tensors, f"adapter {adapter_name!r}")
    shapes = {key.split(f"{NAME}.")[-1]: tuple(v.shape) for key, v in tensors.items() if ".crome_" in f".{key}"}
    linears = weights.linears_of(adapter_name)
    expected = {f"{name}.weight": tuple(linear.weight.shape) for name, linear in linears.items()}
    check_shapes(shapes, expected, f"adapter {adapter_name!r} on {backbone_name(model)}")


def is_of_another_method(module: nn.Module, classes: Any) -> bool:
    """Whether a module carries adapters and belongs to none of the classes."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, classes)


def check_free(model: nn.Module, adapter_name: str, classes: Any) -> None:
    """Refuse the name of another method's adapter. PEFT keeps one configuration per name and would lose the other.

    Raises:
        ValueError: names the method and another name to write.
    """
    for module in model.modules():
        if is_of_another_method(module, classes) and adapter_name in cast(Any, module)._all_available_adapter_names():
            raise ValueError(
                f"An adapter {adapter_name!r} is on this model already, of {type(module).__module__}. Give this one "
                f"another name: get_peft_model(model, config, adapter_name='images')."
            )
