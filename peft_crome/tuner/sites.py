"""Where embeddings of the language model's width are produced: architecture -> module names per branch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Branches = dict[str, list[str]]

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
    owner: dict[str, str] = {}
    for branch, sites in found.items():
        for site in sites:
            for other in owner:
                if site == other or site.startswith(other + ".") or other.startswith(site + "."):
                    raise ValueError(
                        f"branches: {site!r} ({branch}) and {other!r} ({owner[other]}) are the same module or lie inside "
                        "each other, so its embeddings would be adapted twice. Name one of them."
                    )
            owner[site] = branch
    return found


def adaptable_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield path and module of what an adapter may wrap: not the model itself, nothing inside a PEFT layer."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (path + ".",)
            if not hasattr(module, "base_layer"):
                continue  # the container of the adapters' weights
        yield path, module


def text_hidden_size(model: nn.Module) -> int | None:
    """The language model's embedding width as its configuration gives it; None for a model without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), "hidden_size", None)


def possible_widths(module: nn.Module) -> set[int]:
    """Output widths that a module can have: exact for layers that state it, every part's for a container."""
    for name in ("out_features", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return {width}
    parts = [part for part in module.modules() if part is not module]
    widths = {width for part in parts for width in possible_widths(part)}
    return widths or ({shape[-1]} if (shape := getattr(module, "normalized_shape", None)) else set())


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
        hidden_size = text_hidden_size(model)
        wide = [path for path, m in paths.items() if hidden_size in possible_widths(m) and not _is_language(path)]
        vision = next(iter(wide), "<module path>")
        raise ValueError(
            f"No vision site is known for {type(model).__name__} (model_type {model_type!r}); tried "
            f"{sorted(set(table.values())) or 'the table of hosts, which does not have it'}. Modules of the language "
            f"model's width ({hidden_size}) outside it: {wide[:20] or 'none'}. Write CromeConfig(branches="
            f"{{'text': {text[:1] or ['<module path>']!r}, 'vision': [{vision!r}]}}), or join a text-only model to a "
            "vision tower with CromeVLMForConditionalGeneration.from_backbones(vision=..., language=...)."
        )
    return found


def _is_language(path: str) -> bool:
    return bool(re.search(r"(^|\.)(layers|layer|h|block|blocks|lm_head|embed_tokens)(\.|$)", path))


def _match(branch: str, wanted: list[str] | str, paths: dict[str, nn.Module]) -> list[str]:
    if isinstance(wanted, str):
        sites = [path for path in paths if re.fullmatch(wanted, path)]
        missing = [] if sites else [wanted]
    else:
        sites, missing = [], []
        for name in wanted:
            hits = [path for path in paths if path == name or path.endswith("." + name)]
            sites += [path for path in hits if path not in sites]
            missing += [] if hits else [name]
    if missing:
        last_parts = {path.rsplit(".", 1)[-1]: path for path in paths}
        close = [
            last_parts[part] for name in missing for part in difflib.get_close_matches(name.split(".")[-1], last_parts)
        ]
        known = close or [path for path in paths if path.count(".") < 2][:20]
        raise ValueError(
            f"branches[{branch!r}]: {missing} matches no module of the model. Did you mean one of {known}? "
            f"Write branches={{{branch!r}: [{known[0] if known else '<module path>'!r}]}}."
        )
    return sites
