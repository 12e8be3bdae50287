"""What is checked before an adapter changes a model, and what the errors say. Knows module paths and widths only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from .adapter_file import Shapes

Branches = dict[str, list[str]]  # branch -> full paths of its sites


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


def expected_shapes(branches: Branches, hidden_size: int, bottleneck_dim: int) -> Shapes:
    """Names and shapes of the 2·branches + 1 tensors of one adapter's file."""
    shapes: Shapes = {"crome_up.weight": (hidden_size, bottleneck_dim)}
    for branch in branches:
        shapes[f"crome_gate_{branch}.weight"] = shapes[f"crome_down_{branch}.weight"] = (bottleneck_dim, hidden_size)
    return shapes


def find_hidden_size(model: nn.Module, branches: Branches) -> int:
    """The language model's embedding width; every site is checked against it.

    Raises:
        ValueError: the width is unknown, or a site has another one.
    """
    widths = {site: possible_widths(model.get_submodule(site)) for sites in branches.values() for site in sites}
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
                    f"branches[{branch!r}]: {site!r} ({type(model.get_submodule(site)).__name__}) has width "
                    f"{sorted(widths[site])}, the language model's is {hidden_size}. Name the module that maps into "
                    f"the language model: branches={{{branch!r}: ['<its projector>']}}."
                )
    return hidden_size


def check_same_branches(present: Branches, branches: Branches, adapter_name: str) -> None:
    """Refuse an adapter whose sites are not those of the adapters that are there.

    Raises:
        ValueError: names both sets of sites.
    """
    if present and {b: set(s) for b, s in present.items()} != {b: set(s) for b, s in branches.items()}:
        raise ValueError(
            f"Adapter {adapter_name!r} has branches {branches}, the adapters on this model have {present}: they share "
            f"one set of sites. Write branches={present}, or unload() the others first."
        )


def redirect_modules_to_save(names: list[str] | None, branches: Branches) -> list[str] | None:
    """Let PEFT wrap the module inside a site, not the site: the copy it trains must not copy the adapter."""
    sites = [site for branch in branches.values() for site in branch]
    for name in names or []:
        for site in sites:
            if f".{name}." in f".{site}":
                raise ValueError(
                    f"modules_to_save={names}: {name!r} contains the site {site!r}; its copy would hold a second "
                    f"adapter. Write modules_to_save=[{site!r}]."
                )
    inside = {name: [f"{site}.base_layer" for site in sites if site.endswith(name)] for name in names or []}
    return [redirected for name in names for redirected in inside[name] or [name]] if names else names


def check_not_nested(branches: Branches) -> None:
    """Refuse sites that are the same module or lie inside each other.

    Raises:
        ValueError: names both.
    """
    pairs = [(site, branch) for branch, sites in branches.items() for site in sites]
    for number, (site, branch) in enumerate(pairs):
        for other, other_branch in pairs[:number]:
            if site == other or site.startswith(other + ".") or other.startswith(site + "."):
                raise ValueError(
                    f"branches: {site!r} ({branch}) and {other!r} ({other_branch}) are one module or lie inside each "
                    f"other, so embeddings would be adapted twice. Keep one: branches={{{branch!r}: [{site!r}]}}."
                )


def no_such_module(branch: str, missing: list[str], paths: Iterable[str]) -> ValueError:
    """The error for names that match nothing, with the nearest ones."""
    last_parts = {path.rsplit(".", 1)[-1]: path for path in paths}
    near = (difflib.get_close_matches(name.split(".")[-1], last_parts) for name in missing)
    known = [last_parts[part] for parts in near for part in parts] or [path for path in paths if path.count(".") < 2]
    return ValueError(
        f"branches[{branch!r}]: {missing} matches no module of the model. Did you mean one of {known[:20]}? "
        f"Write branches={{{branch!r}: [{known[0] if known else '<module path>'!r}]}}."
    )


def no_vision_site(model: nn.Module, paths: dict[str, nn.Module], text: list[str], tried: Iterable[str]) -> ValueError:
    """The error for an architecture without a known vision site: modules of the right width, and the line to write."""
    hidden_size = text_hidden_size(model)
    inside_llm = re.compile(r"(^|\.)(layers|layer|h|block|blocks|lm_head|embed_tokens)(\.|$)")
    wide = [path for path, m in paths.items() if hidden_size in possible_widths(m) and not inside_llm.search(path)]
    example = {"text": text[:1] or ["<module path>"], "vision": wide[:1] or ["<module path>"]}
    return ValueError(
        f"No vision site is known for {type(model).__name__} (model_type "
        f"{getattr(getattr(model, 'config', None), 'model_type', None)!r}); tried {sorted(set(tried)) or 'nothing'}. "
        f"Modules of the language model's width ({hidden_size}): {wide[:20] or 'none'}. Write CromeConfig(branches="
        f"{example}), or join a text-only model to a vision tower with "
        "CromeVLMForConditionalGeneration.from_backbones(vision=..., language=...)."
    )
