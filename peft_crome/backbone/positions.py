"""Read how many tokens a language model has positions for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Side = Literal["encoder", "decoder"]


def position_limit(config: PreTrainedConfig, side: Side) -> int | None:
    """Return the number of tokens that an encoder or decoder has positions for; None: any number, as in T5.

    Args:
        config: configuration of a decoder-only or encoder-decoder model.
    """
    config = config.get_text_config(encoder=True) if side == "encoder" else config.get_text_config(decoder=True)
    part = getattr(config, side, None)
    config = part if isinstance(part, PreTrainedConfig) else config
    for name in (f"max_{side}_position_embeddings", "max_position_embeddings"):  # LED has the former
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:  # XLNet's -1 means no limit
            return limit
    return None


def check_positions(
    language_model: PreTrainedModel, inputs_embeds: torch.Tensor | None, targets: torch.Tensor | None
) -> None:
    """Refuse more tokens than an encoder-decoder has learned or tabulated positions for.

    Args:
        inputs_embeds: (batch, tokens, hidden), the encoder's input.
        targets: (batch, target tokens), labels or the decoder's ids.
    Raises:
        ValueError: a row is too long; gives its tokens and the limit. PyTorch's error gives at most an index.
    """
    sides: tuple[tuple[Side, torch.Tensor | None, str], ...] = (
        ("encoder", inputs_embeds, "text and image tokens; shorten the text, show fewer images, or pool their tokens"),
        ("decoder", targets, "labels or decoder_input_ids; shorten the answers"),
    )
    for side, tensor, advice in sides:
        part = getattr(language_model, f"get_{side}")()
        # Without such a table the number of positions is unlimited.
        if tensor is None or not isinstance(getattr(part, "embed_positions", None), nn.Embedding):
            continue
        limit = position_limit(language_model.config, side)
        if limit is not None and tensor.shape[1] > limit:
            raise ValueError(f"A row has {tensor.shape[1]} tokens, and the {side} takes {limit} ({advice}).")
