"""The exact merge of the text branch: E' = adapter(E), since that branch is a function of the token alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

ROWS_PER_STEP = 8192  # bounds the memory of the hidden features: 8192 x m floats


def why_not_foldable(module: nn.Module) -> str | None:
    """Return why `module` is no plain table of embeddings, or None if its output is a function of the token alone."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor):
        return f"{type(module).__name__} is not an embedding table"
    if weight.is_meta or not weight.is_floating_point():
        return f"its table is {'on the meta device' if weight.is_meta else weight.dtype}"
    if module.max_norm is not None:
        return "max_norm rescales its rows on every look-up"
    ids = torch.arange(min(16, weight.shape[0]), device=weight.device)
    with torch.no_grad():
        output = module(ids)
    if not isinstance(output, torch.Tensor) or not torch.equal(output, weight[ids] * embed_scale(module)):
        return f"{type(module).__name__} does more than look rows up"
    return None


def embed_scale(module: nn.Embedding) -> torch.Tensor:
    """The factor that scaled embeddings (Gemma, BART) apply to each row, in the table's dtype; 1 for the others."""
    scale = getattr(module, "embed_scale", 1.0)
    return torch.as_tensor(scale, device=module.weight.device).to(module.weight.dtype)


def folded_table(module: nn.Embedding, adapt: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The table whose look-up equals adapt(module(ids)).

    Returns:
        (vocabulary, d), a new tensor. Exact for unscaled tables; where rows are scaled, to one rounding.
    """
    scale = embed_scale(module)
    with torch.no_grad():
        return torch.cat([adapt(rows * scale) / scale for rows in module.weight.split(ROWS_PER_STEP)])


def install_table(module: nn.Embedding, table: torch.Tensor) -> None:
    """Give `module` a new parameter. An in-place change would also alter a tied output head."""
    module.weight = nn.Parameter(table, requires_grad=False)
