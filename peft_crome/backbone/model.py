"""Read widths, embeddings, device and dtype from a backbone, and replace a module in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import PreTrainedModel

from .compat import names_of_ties

# Beyond bytes and special tokens, within every vocabulary that is trained.
KNOWN_ROWS = (307, 409, 503, 601, 701, 809, 907, 1009)
COMPILED = "_orig_mod"  # `torch.compile`'s name for the module that it wraps
PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


@dataclass(frozen=True)
class Host:
    """Facts about a model that an adapter needs.

    Attributes:
        name: the name or path that it was loaded from, else its class.
        embeddings: the module that turns token ids into embeddings; None if the model names none.
        rows: about 1,000 of its embeddings, (rows, width), fp32; None if they have no values.
        rms: root mean square of these rows; 1 if they have no values.
        placeholders: token ids that images, videos and sounds replace.
        device, dtype: of the input embeddings; device is None for a model on the meta device.
    """

    name: str
    embeddings: nn.Module | None
    rows: torch.Tensor | None
    rms: float
    placeholders: tuple[int, ...]
    device: torch.device | None
    dtype: torch.dtype


def read_host(model: nn.Module) -> Host:
    """Read everything from a model, once, that attaching an adapter needs."""
    rows = embedding_rows(model)
    device, dtype = device_and_dtype(model)
    return Host(backbone_name(model), input_embeddings(model), rows, _rms(rows), placeholder_ids(model), device, dtype)


def unwrapped(model: Any, kind: type[nn.Module] = PreTrainedModel) -> Any:
    """Return the outermost model of a kind inside `torch.compile`, DDP, DataParallel, PEFT or a user's wrapper.

    Args:
        model: a model of that kind, or a chain of modules that each wrap one other.
        kind: class of the model to find.
    Returns:
        The model; `model` itself if none is found.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, kind):
        # The adapters' weights are beside the wrapped module.
        children = [child for child in inner.children() if not isinstance(child, BaseTunerLayer)]
        only = children[0] if len(children) == 1 else None
        inner = inner._modules.get("module", only)
    return inner if isinstance(inner, kind) else model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Put the modules that `torch.compile` wraps inside a model in their wrappers' places while the block runs."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    places = [place for place in places if place[2] is not None and COMPILED in place[2]._modules]
    for parent, name, child in reversed(places):
        parent._modules[name] = child._modules[COMPILED]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def backbone_name(model: nn.Module) -> str:
    """Return the name or path that a model was loaded from, else its class."""
    model = unwrapped(model)
    return getattr(model, "name_or_path", "") or type(model).__name__


def text_config(model: nn.Module) -> Any:
    """Return the language model's part of a model's configuration; None for a model without one."""
    config = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None


def text_hidden_size(model: nn.Module) -> int | None:
    """Return the embedding width of the language model: its table's, else its configuration's; None without one.

    If they differ, as in OPT-350m, embeddings have the table's width and the model projects them.
    """
    width = getattr(input_embeddings(model), "embedding_dim", None)
    return width if isinstance(width, int) else getattr(text_config(model), "hidden_size", None)


def possible_widths(module: nn.Module) -> set[int]:
    """Collect output widths that a module can have: exact for layers that state it, every part's for a container."""
    stated_width = _stated_width(module)
    return {stated_width} if stated_width else {width for part in module.modules() if (width := _stated_width(part))}


def _stated_width(module: nn.Module) -> int | None:
    for name in ("out_features", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.out_channels
    return None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that turns token ids into embeddings, or None if the model names none."""
    try:
        return unwrapped(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def original_module(module: Any) -> Any:
    """Return the module inside adapters, beside PEFT's trained copy, and inside `torch.compile`; else the module."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module._modules.get(COMPILED, module) if isinstance(module, nn.Module) else module


def placeholder_ids(model: nn.Module) -> tuple[int, ...]:
    """Return the token ids that images, videos and sounds replace, as the model's configuration names them."""
    model = unwrapped(model)
    settings = vars(model.config) if hasattr(model, "config") else {}
    ids = {value for name, value in settings.items() if PLACEHOLDER.fullmatch(name) and isinstance(value, int)}
    return tuple(sorted(ids))


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of `old`: both halves of BART can hold one embedding module."""
    for parent in list(model.modules()):
        if parent is not new:
            for name in [name for name, child in parent.named_children() if child is old]:
                parent._modules[name] = new  # a compiled module would forward a set attribute


def device_and_dtype(model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Return device and dtype of the input embeddings; device is None for a model on the meta device."""
    for module in (input_embeddings(model), model):
        for parameter in module.parameters() if module is not None else ():
            if parameter.is_floating_point() and not parameter.is_meta:
                return parameter.device, parameter.dtype
    return None, torch.float32


def tied_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights that a model's configurations tie; the model has no sites around its tables."""
    host = unwrapped(model)
    return names_of_ties(host) if isinstance(host, PreTrainedModel) else set()


def separate(model: nn.Module, tied: set[str]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give a separate copy to each weight that is no longer tied, since a checkpoint has to store them all.

    Args:
        tied: `tied_weights(model)` before the model's configurations were changed.
    Returns:
        Each module that has a copy now, the weight's name in it, and the earlier weight.
    """
    host, before, seen = unwrapped(model), [], set()
    for name in sorted(tied - tied_weights(model)):
        path, _, leaf = name.rpartition(".")
        try:
            module = host.get_submodule(path)
        except AttributeError:  # this model lacks that head
            continue
        weight = module._parameters.get(leaf)
        if weight is not None and id(weight) in seen and not weight.is_meta:
            before.append((module, leaf, weight))
            setattr(module, leaf, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
        seen.add(id(weight))
    return before


def part_for_good(model: nn.Module, tied: set[str]) -> None:
    """Run `separate` for good: transformers forgets the tie, or a composite made of the model would tie again."""
    separate(model, tied)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def embed_scale(module: nn.Embedding) -> torch.Tensor:
    """Return the factor of scaled embeddings (Gemma, BART) for each row, in the table's dtype; 1 for other tables."""
    scale = getattr(module, "embed_scale", 1.0)
    return torch.as_tensor(scale, device=module.weight.device).to(module.weight.dtype)


def embedding_rows(model: nn.Module) -> torch.Tensor | None:
    """Return about 1,000 evenly spread rows that the text branch reads, in fp32; None if there are no values.

    The first eight are fixed tokens, so they do not change when a vocabulary grows.
    """
    embeddings = input_embeddings(model)
    table = original_module(embeddings)
    weight = getattr(embeddings, "unmerged_table", None)
    weight = weight if weight is not None else getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    with gather_params_ctx(weight, modifier_rank=None):  # ZeRO-3 has partitioned it
        if weight.is_meta or not weight.is_floating_point() or weight.dim() != 2:
            return _called_rows(table)
        rows = weight.detach()[_some_ids(weight.shape[0])]
        return (rows * embed_scale(table)).float()


def _some_ids(count: int) -> list[int]:
    return [*(number % count for number in KNOWN_ROWS), *range(0, count, max(1, count // 1024))]


@torch.no_grad()
def _called_rows(table: Any) -> torch.Tensor | None:
    """Look rows up in a table whose weight is packed or offloaded (accelerate fetches it); None if impossible."""
    if not isinstance(getattr(table, "num_embeddings", None), int):
        return None
    device = "cpu" if table.weight.is_meta else table.weight.device
    if table.weight.is_meta and not hasattr(table, "_hf_hook"):
        return None
    rows = table(torch.tensor(_some_ids(table.num_embeddings), device=device))
    usable = isinstance(rows, torch.Tensor) and rows.is_floating_point() and rows.dim() == 2 and not rows.is_meta
    return rows.float().cpu() if usable else None


def _rms(rows: torch.Tensor | None) -> float:
    # The median, since rows of tokens that never trained may be zero or outliers.
    return 1.0 if rows is None else float(rows[len(KNOWN_ROWS) :].square().mean(-1).sqrt().median()) or 1.0
