"""Redirect modules that train beside an adapter, `modules_to_save` and `trainable_token_indices`, into the sites."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from peft.utils import TrainableTokensWrapper
from peft.utils.other import _set_trainable
from torch import nn

from ...backbone.model import input_embeddings
from ..branches import Branches, site_path
from ..layer import CromeLayer


def redirect_into_sites(
    names: list[str] | None, field: str, branches: Branches, paths: Iterable[str], heads: tuple[str, ...] = ()
) -> dict[str, str]:
    """Find where PEFT must wrap the modules of `modules_to_save` and the like: inside a site, not around it.

    A wrapper around a site would train a copy of it that holds a copy of the adapter.

    Args:
        heads: names that PEFT adds for a task, which may be missing.
    Returns:
        Each name that PEFT would match -> the name to give PEFT instead.
    Raises:
        ValueError: a name matches no module, or a module that contains a site.
    """
    sites = [site_path(site) for branch in branches.values() for site in branch]
    known = list(paths)
    redirected = {}
    for entry in names or []:
        name = entry.removesuffix(".base_layer")  # a saved configuration has the redirected name
        for site in sites:
            if f".{name}." in f".{site}":
                raise ValueError(
                    f"{field}={names}: {name!r} contains the site {site!r}; its copy would hold a second adapter. "
                    f"Write {field}=[{site!r}]."
                )
        inside = [f"{site}.base_layer" for site in sites if site.endswith(name)]
        within = [site for site in sites for path in known if path.endswith(name) and path.startswith(site + ".")]
        if within and not inside:
            raise ValueError(
                f"{field}={names}: {name!r} lies inside the site {within[0]!r}, which PEFT can only train whole. "
                f"Write {field}=[{within[0]!r}]."
            )
        if not inside and not any(path.endswith(name) for path in known):
            if name in heads:
                continue
            near = difflib.get_close_matches(name, {path.rsplit(".", 1)[-1] for path in known}, n=1) or ["lm_head"]
            raise ValueError(f"{field}={names}: {name!r} matches no module of the model. Write {field}=[{near[0]!r}].")
        redirected.update(dict.fromkeys(inside or [name], entry))
    return redirected


def redirect_token_indices(
    indices: list[int] | dict[str, list[int]] | None,
    embeddings: str | None,
    branches: Branches,
    paths: Iterable[str],
    rows: int | None = None,
) -> list[int] | dict[str, list[int]] | None:
    """Do the same as `redirect_into_sites` for `trainable_token_indices`; a list means the input embeddings.

    Args:
        rows: number of rows of the embedding table, if known.
    """
    if isinstance(indices, list) and embeddings is not None:
        indices = {embeddings: indices}
    if not isinstance(indices, dict):
        return indices
    redirected = redirect_into_sites(list(indices), "trainable_token_indices", branches, paths)
    if rows is not None and any(index >= rows for ids in indices.values() for index in ids):
        largest = max(index for ids in indices.values() for index in ids)
        raise ValueError(
            f"trainable_token_indices: {largest} is beyond the model's {rows} embeddings. Resize them first, "
            f"model.resize_token_embeddings({largest + 1}), or leave it out."
        )
    return {path: indices[name] for path, name in redirected.items()}


def tie_trained_tokens(model: nn.Module, adapter_name: str, inference_mode: bool) -> None:
    """Train the same tokens in every module tied to the table, as PEFT does for a table without a site.

    Otherwise a head would keep the old rows until a merge writes the new ones into the shared weight.
    """
    table = input_embeddings(model)
    wrapper = table.base_layer if isinstance(table, CromeLayer) else table
    tokens = wrapper.token_adapter if isinstance(wrapper, TrainableTokensWrapper) else None
    if tokens is None or adapter_name not in tokens.token_indices:
        return
    base = tokens.get_base_layer()
    tied = [
        path
        for path, module in model.named_modules()
        if module is not base
        and module._parameters.get("weight") is base.weight
        and not path.endswith(".original_module")
    ]
    _set_trainable(
        model,
        adapter_name,
        tied,
        inference_mode,
        wrapper_cls=TrainableTokensWrapper,
        token_indices=tokens.token_indices[adapter_name],
        tied_adapter=tokens,
    )
