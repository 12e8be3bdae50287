"""What is checked before an adapter changes a model, and what the errors say. Knows module paths and widths only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter_file import Shapes
from .backbone import possible_widths, text_hidden_size

Branches = dict[str, list[str]]  # branch -> full paths of its sites; of a range of token ids: "embed_tokens[4:8196]"

TOKEN_RANGE = re.compile(r"\[(\d+):(\d+)\]$")


def site_path(site: str) -> str:
    """The module's path, without a range of token ids."""
    return TOKEN_RANGE.sub("", site)


def token_range(site: str) -> list[tuple[int, int]]:
    """The range of token ids at the end of a site's name, half-open; none: all tokens."""
    return [(int(start), int(stop)) for start, stop in TOKEN_RANGE.findall(site)]


def with_ranges(path: str, ranges: list[tuple[int, int]]) -> list[str]:
    """The inverse of `site_path` and `token_range`."""
    return [f"{path}[{start}:{stop}]" for start, stop in ranges] or [path]


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


def present_branches(model: nn.Module, layer_cls: type[nn.Module], adapter_name: str) -> Branches:
    """The sites of an adapter that is on a model, by branch."""
    present: Branches = {}
    for name, module in model.named_modules():
        if isinstance(module, layer_cls):
            for branch, ranges in cast(Any, module).branches_of.get(adapter_name, {}).items():
                present.setdefault(branch, []).extend(with_ranges(name, ranges))
    return present


def same_branches(one: Branches, other: Branches) -> bool:
    """Whether both have the same branches on the same sites, in whichever order."""
    return {b: set(s) for b, s in one.items()} == {b: set(s) for b, s in other.items()}


def check_names(model: nn.Module, child: str, own: type, adapter_name: str, shapes: Shapes) -> None:
    """Refuse names that could not be told apart: of the adapter in its file's keys, of the child that holds weights.

    Raises:
        ValueError: names what is taken, and another name to write.
    """
    if not isinstance(model._modules.get(child, getattr(model, child, None)), (own, type(None))):
        raise ValueError(f"{type(model).__name__} has an attribute {child!r} of its own, where CROME's weights go.")
    taken = {part for key in shapes for part in f"base_model.model.{child}.{key}".split(".")}
    no_folder = not adapter_name.strip() or re.search(r"[/\\\x00]", adapter_name)  # PEFT saves to a folder of its name
    if "." in adapter_name or no_folder or adapter_name in taken or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} has a dot or a slash, or is part of the weights' own names: a file could "
            "not tell adapters apart. Write adapter_name='default', or another word."
        )


def is_of_another_method(module: nn.Module, own: Any) -> bool:
    """Whether a module carries adapters, and none of the classes `own`."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, own)


def check_free(model: nn.Module, adapter_name: str, own: Any) -> None:
    """Refuse the name of another method's adapter: PEFT keeps one configuration per name, and would lose that one.

    Raises:
        ValueError: names the method, and another name to write.
    """
    for module in model.modules():
        if is_of_another_method(module, own) and adapter_name in cast(Any, module)._all_available_adapter_names():
            raise ValueError(
                f"An adapter {adapter_name!r} is on this model already, of {type(module).__module__}. Give this one "
                f"another name: get_peft_model(model, config, adapter_name='pictures')."
            )


def redirect_into_sites(
    names: list[str] | None, field: str, branches: Branches, paths: Iterable[str], heads: tuple[str, ...] = ()
) -> dict[str, str]:
    """Where PEFT is to wrap the modules of `modules_to_save` and the like: inside a site, not around it.

    A wrapper around a site would train a copy of it that holds a copy of the adapter.

    Args:
        heads: names that may be missing, which PEFT adds for a task.
    Returns:
        each name that PEFT would match -> the name to give PEFT instead.
    Raises:
        ValueError: a name matches no module, or a module that contains a site.
    """
    sites = [site_path(site) for branch in branches.values() for site in branch]
    known = list(paths)
    redirected = {}
    for given in names or []:
        name = given.removesuffix(".base_layer")  # a saved configuration has the redirected name
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
        redirected.update(dict.fromkeys(inside or [name], given))
    return redirected


def redirect_token_indices(
    indices: list[int] | dict[str, list[int]] | None,
    embeddings: str | None,
    branches: Branches,
    paths: Iterable[str],
    rows: int | None = None,
) -> list[int] | dict[str, list[int]] | None:
    """The same as `redirect_into_sites`, for `trainable_token_indices`; a list is meant for the input embeddings.

    Args:
        rows: of the embedding table, where it is known.
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


def no_regex(branch: str, pattern: str, error: re.error) -> ValueError:
    """The error for a pattern that does not compile."""
    return ValueError(
        f"branches[{branch!r}]={pattern!r} is not a regular expression: {error}. "
        f"Write branches={{{branch!r}: ['<module path>']}}, or mend the pattern."
    )


def check_not_nested(branches: Branches) -> None:
    """Refuse sites that are the same module or lie inside each other.

    Of one table, branches may take ranges of token ids that do not overlap.

    Raises:
        ValueError: names both.
    """
    pairs = [(site, branch) for branch, sites in branches.items() for site in sites]
    for number, (site, branch) in enumerate(pairs):
        for other, other_branch in pairs[:number]:
            path, other_path = site_path(site), site_path(other)
            ids, other_ids = token_range(site), token_range(other)
            if path == other_path and ids != other_ids:
                apart = not ids or not other_ids or ids[0][1] <= other_ids[0][0] or other_ids[0][1] <= ids[0][0]
            else:
                apart = not (
                    path == other_path or path.startswith(other_path + ".") or other_path.startswith(path + ".")
                )
            if not apart:
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


def no_such_branch(model: nn.Module, missing: list[str], found: Branches) -> ValueError:
    """The error for branches that were asked for by name and are not known of this architecture."""
    return ValueError(
        f"branches: {missing} are not known for {type(model).__name__}; known: {found}. Write branches={[*found]}, or "
        f"name the modules: branches={{{missing[0]!r}: ['<module path>']}}."
    )


def no_vision_site(model: nn.Module, paths: dict[str, nn.Module], text: list[str], tried: Iterable[str]) -> ValueError:
    """The error for an architecture without a known vision site: modules of the right width, and the line to write."""
    hidden_size = text_hidden_size(model)
    inside_llm = re.compile(r"(^|\.)(layers|layer|h|block|blocks|lm_head|embed_tokens)(\.|$)")
    wide = [path for path, m in paths.items() if hidden_size in possible_widths(m) and not inside_llm.search(path)]
    # A projector is likelier than a tower that also happens to have this width inside.
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
