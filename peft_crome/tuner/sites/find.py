"""Find the modules that produce the language model's embeddings, by rules (`rules.py`) and a table (`table.py`)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...backbone.model import COMPILED, original_module, unwrapped
from ..branches import Branches, site_path
from .errors import check_not_nested, no_regex, no_such_branch, no_such_module, no_vision_site
from .rules import by_token_id, projectors, text_sites
from .table import HOSTS

WEIGHTS_PER_WIDTH = 1280  # the paper's adapter has 5·d·256 weights; keep that for any number of branches


def default_bottleneck_dim(branches: int) -> int:
    """Return the hidden features m with which (2·branches + 1)·d·m is about 1280·d; a multiple of 8.

    >>> [default_bottleneck_dim(branches) for branches in (1, 2, 3)]
    [424, 256, 184]
    """
    return 8 * max(1, round(WEIGHTS_PER_WIDTH / (2 * branches + 1) / 8))


def find_branches(
    model: nn.Module, branches: list[str] | dict[str, list[str] | str] | None, of_before: bool = False
) -> Branches:
    """Resolve a configuration's `branches` to full module paths, or find them by architecture.

    A path may end in a range of token ids, "embed_tokens[4:8196]". Then the branch has only these tokens' embeddings.

    Args:
        branches: None: the branches that carry images and sound. Without a Q-Former, the text branch would be on
            the embedding table, and is left out.
        of_before: None means all known branches, as in adapters from before the default left the text branch out.
    Raises:
        ValueError: the architecture is unknown, or a name matches no branch, no module or two branches.
    """
    paths = dict(adaptable_modules(model))
    if isinstance(branches, dict):
        named = {branch: _match(branch, wanted, paths) for branch, wanted in branches.items()}
        check_not_nested(named)
        return named
    table = HOSTS.get(str(getattr(getattr(unwrapped(model), "config", None), "model_type", None)), {})
    known = _find_by_rules(model, paths, table)
    tables = text_sites(model, paths)
    text = known.get("text", [])
    words = any(site in tables or isinstance(original_module(paths[site]), nn.Embedding) for site in text)
    images = {branch: sites for branch, sites in known.items() if branch != "text" or not words}
    missing = [branch for branch in branches or [] if branch not in known]
    if not images and (missing or branches is None):
        raise no_vision_site(model, paths, tables, [suffix for suffixes in table.values() for suffix in suffixes])
    if missing:
        raise no_such_branch(model, missing, known)
    if branches is None:
        return known if of_before else images
    return {branch: known[branch] for branch in branches}


def adaptable_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield path and module of everything that an adapter may wrap. The model itself and parts of PEFT layers are out.

    Of a compiled module only the wrapper's path is yielded.
    """
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (path + ".",)
            if not hasattr(module, "base_layer"):
                continue  # the container of the adapters' weights
        if path.rsplit(".", 1)[-1] != COMPILED:
            yield path, module


def _find_by_rules(model: nn.Module, paths: dict[str, nn.Module], table: dict[str, list[str]]) -> Branches:
    # A module may have several paths (UDOP's patch embedding in transformers 4); `paths` has the first one.
    first = {module: path for path, module in paths.items()}
    everywhere = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if module in first]
    named = {
        branch: list(
            dict.fromkeys(
                first[module]
                for path, module in everywhere
                for suffix in suffixes
                if f".{path}".endswith("." + suffix)
            )
        )
        for branch, suffixes in table.items()
    }
    text = named.get("text") or text_sites(model, paths)
    branches: Branches = {"text": text} if text else {}
    if text:
        branches |= by_token_id(model, text) or projectors(model, paths, text)
    return branches | {branch: sites for branch, sites in named.items() if sites}


def _match(branch: str, wanted: list[str] | str, paths: dict[str, nn.Module]) -> list[str]:
    if isinstance(wanted, str):
        try:
            sites = [path for path in paths if re.fullmatch(wanted, path)]
        except re.error as error:
            raise no_regex(branch, wanted, error) from error
        missing = [] if sites else [wanted]
    else:
        sites, missing = [], []
        for entry in wanted:
            name = site_path(entry)
            hits = [path for path in paths if path == name or path.endswith("." + name)]
            sites += [site for path in hits if (site := path + entry[len(name) :]) not in sites]
            missing += [] if hits else [entry]
    if missing:
        raise no_such_module(branch, missing, paths)
    return sites
