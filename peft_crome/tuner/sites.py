"""Where embeddings of the language model's width are produced: architecture -> module names per branch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checks import Branches, check_not_nested, no_regex, no_such_module, no_vision_site

# model_type -> branch -> last part of the path of the module whose output enters the language model.
# The text branch is the module that get_input_embeddings() returns, unless it is named here.
HOSTS: dict[str, dict[str, str]] = {
    "crome_vlm": {"vision": "vision_fusion"},
    "gemma3": {"vision": "multi_modal_projector"},
    "idefics3": {"vision": "connector"},
    "instructblip": {"vision": "language_projection"},
    "internvl": {"vision": "multi_modal_projector"},
    "llava": {"vision": "multi_modal_projector"},
    "llava_next": {"vision": "multi_modal_projector"},
    "paligemma": {"vision": "multi_modal_projector"},
    "qwen2_5_vl": {"vision": "visual.merger"},
    "smolvlm": {"vision": "connector"},
}


def find_branches(model: nn.Module, branches: dict[str, list[str] | str] | None) -> Branches:
    """Resolve a configuration's `branches`, or look the architecture up, to full module paths.

    Raises:
        ValueError: nothing is known of the architecture, or a name matches no module or two branches.
    """
    paths = dict(adaptable_modules(model))
    if branches is None:
        return _find_by_architecture(model, paths)
    found = {branch: _match(branch, wanted, paths) for branch, wanted in branches.items()}
    check_not_nested(found)
    return found


def adaptable_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield path and module of what an adapter may wrap: not the model itself, nothing inside a PEFT layer."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (path + ".",)
            if not hasattr(module, "base_layer"):
                continue  # the container of the adapters' weights
        yield path, module


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into embeddings, or None where the model names none."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _find_by_architecture(model: nn.Module, paths: dict[str, nn.Module]) -> Branches:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    table = HOSTS.get(str(model_type), {})
    found: Branches = {}
    embeddings = input_embeddings(model)
    text = [path for path, module in paths.items() if module is embeddings]
    if text:
        found["text"] = text[:1]
    for branch, suffix in table.items():
        sites = [path for path in paths if path == suffix or path.endswith("." + suffix)]
        if sites:
            found[branch] = sites
    if not any(branch != "text" for branch in found):
        raise no_vision_site(model, paths, text, table.values())
    return found


def _match(branch: str, wanted: list[str] | str, paths: dict[str, nn.Module]) -> list[str]:
    if isinstance(wanted, str):
        try:
            sites = [path for path in paths if re.fullmatch(wanted, path)]
        except re.error as error:
            raise no_regex(branch, wanted, error) from error
        missing = [] if sites else [wanted]
    else:
        sites, missing = [], []
        for name in wanted:
            hits = [path for path in paths if path == name or path.endswith("." + name)]
            sites += [path for path in hits if path not in sites]
            missing += [] if hits else [name]
    if missing:
        raise no_such_module(branch, missing, paths)
    return sites
