"""Errors about sites, each with what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from ...backbone.model import possible_widths, text_hidden_size
from ..branches import Branches, site_path, token_range


def no_regex(branch: str, pattern: str, error: re.error) -> ValueError:
    """Build the error for a pattern that does not compile."""
    return ValueError(
        f"branches[{branch!r}]={pattern!r} is not a regular expression: {error}. "
        f"Write branches={{{branch!r}: ['<module path>']}}, or correct the pattern."
    )


def check_not_nested(branches: Branches) -> None:
    """Refuse sites that are the same module or lie inside each other.

    Branches may use ranges of token ids of one table if the ranges do not overlap.

    Raises:
        ValueError: names both sites.
    """
    pairs = [(site, branch) for branch, sites in branches.items() for site in sites]
    for number, (site, branch) in enumerate(pairs):
        for other, other_branch in pairs[:number]:
            path, other_path = site_path(site) + ".", site_path(other) + "."
            ids, other_ids = token_range(site), token_range(other)
            if path == other_path and ids != other_ids:
                apart = not ids or not other_ids or ids[0][1] <= other_ids[0][0] or other_ids[0][1] <= ids[0][0]
            else:
                apart = not path.startswith(other_path) and not other_path.startswith(path)
            if not apart:
                raise ValueError(
                    f"branches: {site!r} ({branch}) and {other!r} ({other_branch}) are one module or lie inside each "
                    f"other, so embeddings would be adapted twice. Keep one: branches={{{branch!r}: [{site!r}]}}."
                )


def no_such_module(branch: str, missing: list[str], paths: Iterable[str]) -> ValueError:
    """Build the error for names that match nothing, with the nearest names."""
    last_parts = {path.rsplit(".", 1)[-1]: path for path in paths}
    near = (difflib.get_close_matches(name.split(".")[-1], last_parts) for name in missing)
    known = [last_parts[part] for parts in near for part in parts] or [path for path in paths if path.count(".") < 2]
    return ValueError(
        f"branches[{branch!r}]: {missing} matches no module of the model. Did you mean one of {known[:20]}? "
        f"Write branches={{{branch!r}: [{known[0] if known else '<module path>'!r}]}}."
    )


def no_such_branch(model: nn.Module, missing: list[str], known: Branches) -> ValueError:
    """Build the error for branches that are requested by name and unknown for this architecture."""
    return ValueError(
        f"branches: {missing} are not known for {type(model).__name__}; known: {known}. Write branches={[*known]}, or "
        f"name the modules: branches={{{missing[0]!r}: ['<module path>']}}."
    )


def no_vision_site(model: nn.Module, paths: dict[str, nn.Module], text: list[str], tried: Iterable[str]) -> ValueError:
    """Build the error for an architecture without a known vision site; lists modules of the right width."""
    hidden_size = text_hidden_size(model)
    inside_llm = re.compile(r"(^|\.)(layers|layer|h|block|blocks|lm_head|embed_tokens)(\.|$)")
    wide = [path for path, m in paths.items() if hidden_size in possible_widths(m) and not inside_llm.search(path)]
    # A projector is likelier than a tower that happens to have this width inside.
    towers = {path for path in wide if any(isinstance(part, nn.ModuleList) for part in paths[path].modules())}
    wide.sort(key=lambda path: (path in towers, path in text, len(possible_widths(paths[path])), path.count(".")))
    example = {"vision": wide[:1] or ["<module path>"]}
    return ValueError(
        f"No vision site is known for {type(model).__name__} (model_type "
        f"{getattr(getattr(model, 'config', None), 'model_type', None)!r}); tried {sorted(set(tried)) or 'nothing'}. "
        f"Modules of the language model's width ({hidden_size}): {wide[:20] or 'none'}. Write CromeConfig(branches="
        f"{example}), or join a text-only model to a vision tower with "
        "CromeVLMForConditionalGeneration.from_backbones(vision=..., language=...)."
    )
