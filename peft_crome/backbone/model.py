"""What the adapter reads off a backbone: widths, embeddings, device and dtype; and how a module is replaced in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

KNOWN_ROWS = (
    307,
    409,
    503,
    601,
    701,
    809,
    907,
    1009,
)  # beyond bytes and special tokens, within every vocabulary that is trained
PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


@dataclass(frozen=True)
class Host:
    """What an adapter needs to know of a model.

    Attributes:
        name: the name or path that it was loaded from, else its class.
        embeddings: the module that turns token ids into embeddings; None where the model names none.
        rows: about 1,000 of its embeddings, (rows, width), fp32; None where there are no values.
        rms: root mean square of these; 1 where there are no values.
        placeholders: token ids in whose place images, videos and sounds are put.
        device, dtype: of the embeddings; no device for a model on the meta device.
    """

    name: str
    embeddings: nn.Module | None
    rows: torch.Tensor | None
    rms: float
    placeholders: tuple[int, ...]
    device: torch.device | None
    dtype: torch.dtype


def read_host(model: nn.Module) -> Host:
    """Read a model once, for all that attaching an adapter asks of it."""
    rows = embedding_rows(model)
    device, dtype = device_and_dtype(model)
    return Host(backbone_name(model), input_embeddings(model), rows, _rms(rows), placeholder_ids(model), device, dtype)


def backbone_name(model: nn.Module) -> str:
    """The name or path that a model was loaded from, else its class."""
    return getattr(model, "name_or_path", "") or type(model).__name__


def text_config(model: nn.Module) -> Any:
    """The language model's part of a model's configuration; None for a model without one."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None


def text_hidden_size(model: nn.Module) -> int | None:
    """The language model's embedding width: its table's, else its configuration's; None for a model without one.

    Where they differ, as in OPT-350m, embeddings have the table's width and the model projects them.
    """
    width = getattr(input_embeddings(model), "embedding_dim", None)
    return width if isinstance(width, int) else getattr(text_config(model), "hidden_size", None)


def possible_widths(module: nn.Module) -> set[int]:
    """Output widths that a module can have: exact for layers that state it, every part's for a container."""
    own = _stated_width(module)
    return {own} if own else {width for part in module.modules() if (width := _stated_width(part))}


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
    """The module that turns token ids into embeddings, or None where the model names none."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, or None where the model names none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def original_module(module: nn.Module) -> nn.Module:
    """What PEFT keeps of a module beside a copy that trains; the module itself where there is no copy."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def placeholder_ids(model: nn.Module) -> tuple[int, ...]:
    """The token ids in whose place a model puts images, videos and sounds, as its configuration names them."""
    settings = vars(model.config) if hasattr(model, "config") else {}
    found = {value for name, value in settings.items() if PLACEHOLDER.fullmatch(name) and isinstance(value, int)}
    return tuple(sorted(found))


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, which may have several: BART's halves can hold one embedding module."""
    for parent in list(model.modules()):
        if parent is not new:
            for name in [name for name, child in parent.named_children() if child is old]:
                setattr(parent, name, new)


def device_and_dtype(model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where the input embeddings are and in which dtype; no device for a model on the meta device."""
    for module in filter(None, (input_embeddings(model), model)):
        for parameter in module.parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                return parameter.device, parameter.dtype
    return None, torch.float32


def embed_scale(module: nn.Embedding) -> torch.Tensor:
    """The factor that scaled embeddings (Gemma, BART) apply to each row, in the table's dtype; 1 for the others."""
    scale = getattr(module, "embed_scale", 1.0)
    return torch.as_tensor(scale, device=module.weight.device).to(module.weight.dtype)


def embedding_rows(model: nn.Module) -> torch.Tensor | None:
    """About 1,000 rows, evenly spread, of what the text branch reads, in fp32; None where there are no values.

    The first eight are fixed tokens, so that they stay when a vocabulary grows.
    """
    embeddings = input_embeddings(model)
    table = embeddings.get_base_layer() if isinstance(embeddings, BaseTunerLayer) else embeddings
    weight = getattr(embeddings, "unmerged_table", None)
    weight = weight if weight is not None else getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    if weight.is_meta or not weight.is_floating_point() or weight.dim() != 2:
        return _called_rows(table)
    rows = weight.detach()[_some_ids(weight.shape[0])]
    return (rows * embed_scale(table)).float()


def _some_ids(count: int) -> list[int]:
    return [*(number % count for number in KNOWN_ROWS), *range(0, count, max(1, count // 1024))]


@torch.no_grad()
def _called_rows(table: Any) -> torch.Tensor | None:
    """What a table gives whose weight is packed, or offloaded (accelerate's hook fetches it); None: nothing."""
    if not isinstance(getattr(table, "num_embeddings", None), int):
        return None
    device = "cpu" if table.weight.is_meta else table.weight.device
    if table.weight.is_meta and not hasattr(table, "_hf_hook"):
        return None
    rows = table(torch.tensor(_some_ids(table.num_embeddings), device=device))
    usable = isinstance(rows, torch.Tensor) and rows.is_floating_point() and rows.dim() == 2 and not rows.is_meta
    return rows.float().cpu() if usable else None


def _rms(rows: torch.Tensor | None) -> float:
    # The median, since rows of tokens that no training met may be zero or far off.
    return 1.0 if rows is None else float(rows[len(KNOWN_ROWS) :].square().mean(-1).sqrt().median()) or 1.0
