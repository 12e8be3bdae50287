"""Merge the text branch exactly, E' = adapter(E), since the branch is a function of the token alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...backbone.model import embed_scale

ROWS_PER_STEP = 8192  # bounds the memory of the hidden features: 8192 x m floats


def why_not_foldable(module: nn.Module) -> str | None:
    """Return why `module` is not a plain embedding table, or None if its output is a function of the token alone."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor):
        return f"{type(module).__name__} is not an embedding table"
    if weight.is_meta or not weight.is_floating_point():
        return f"its table is {'on the meta device' if weight.is_meta else weight.dtype}"
    if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
        return f"{type(module).__name__} does more than look rows up"  # Ovis 2 mixes rows
    if module.max_norm is not None:
        return "max_norm rescales its rows on every look-up"
    scale = embed_scale(module)
    with torch.no_grad():
        for ids in torch.arange(len(weight), device=weight.device).split(ROWS_PER_STEP):
            output = module(ids)
            if not isinstance(output, torch.Tensor) or not torch.equal(output, weight[ids] * scale):
                return f"{type(module).__name__} does more than look rows up"  # T5Gemma 2 keeps a row beside the table
    return None


def folded_table(module: nn.Embedding, adapt: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Compute the table whose look-up equals adapt(module(ids), ids).

    Returns:
        (vocabulary, d), a new tensor. Exact for unscaled tables; up to one rounding if rows are scaled.
    """
    scale = embed_scale(module)
    with torch.no_grad():
        ids = torch.arange(module.num_embeddings, device=module.weight.device).split(ROWS_PER_STEP)
        return torch.cat([adapt(module.weight[some] * scale, some) / scale for some in ids])


def install_table(module: nn.Embedding, table: torch.Tensor) -> None:
    """Give `module` a new parameter. An in-place change would also alter a tied output head."""
    module.weight = nn.Parameter(table, requires_grad=False)
