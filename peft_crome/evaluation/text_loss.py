"""Measure what an adapter costs the language model on plain text: the loss with the adapter on and off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..backbone.labeled import IGNORED
from ..backbone.model import unwrapped
from ..backbone.modes import evaluating

TOKENS_AT_A_TIME = 128


@dataclass(frozen=True)
class TextLoss:
    """Mean loss on plain text, in nats a token.

    Attributes:
        adapted: loss with the active adapters.
        base: loss without them.
        cost: adapted - base. It is exactly 0.0 if the adapters do not change text.
        adapted_stderr, base_stderr, cost_stderr: standard errors over the chunks. NaN for a single chunk.
        tokens: number of predicted tokens.
        chunks: number of pieces that the text was cut into.
    """

    adapted: float
    base: float
    cost: float
    adapted_stderr: float
    base_stderr: float
    cost_stderr: float
    tokens: int
    chunks: int


@torch.no_grad()
def text_loss(
    model: Any, tokenizer: Any, text: str, *, chunk_tokens: int = 512, batch_size: int = 4, progress: bool = True
) -> TextLoss:
    """Measure a model's loss on a text without images, with its adapters and without them.

    The text is cut into chunks, and each token of a chunk is predicted from those before it. An encoder-decoder reads
    the first half of a chunk and predicts the second.

    Args:
        model: a model that generates text, with adapters of any PEFT method or none. It may be a composite.
        tokenizer: the model's tokenizer.
        text: plain text. 50,000 tokens or more give a small standard error.
        chunk_tokens: number of tokens in a chunk.
        batch_size: number of chunks in a batch.
        progress: whether to show a progress bar.
    Returns:
        The losses. Each module of the model stays in its mode.
    Raises:
        ValueError: the text has fewer than two tokens.
    """
    # `verbose` would warn about a text that is longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < 2:
        raise ValueError(f"The text has {len(ids)} tokens, and a loss takes two. Pass a longer text.")
    chunks = [ids[first : first + chunk_tokens] for first in range(0, len(ids), chunk_tokens)]
    if len(chunks[-1]) < 2:
        chunks.pop()
    encoder_decoder = unwrapped(model).config.is_encoder_decoder
    start = (
        [] if encoder_decoder or tokenizer("a").input_ids[0] != tokenizer.bos_token_id else [tokenizer.bos_token_id]
    )
    sums: dict[str, list[float]] = {"adapted": [], "base": []}
    counts: list[int] = []
    with evaluating(model):
        for first in tqdm(range(0, len(chunks), batch_size), desc="text loss", leave=False, disable=not progress):
            batch = _batch(chunks[first : first + batch_size], start, encoder_decoder, model.device)
            targets = batch["labels"] if encoder_decoder else batch["labels"][:, 1:]
            counts += (targets != IGNORED).sum(-1).tolist()
            sums["adapted"] += _row_losses(model, batch, targets, encoder_decoder)
            with adapters_off(model):
                sums["base"] += _row_losses(model, batch, targets, encoder_decoder)
    sums["cost"] = [on - off for on, off in zip(sums["adapted"], sums["base"], strict=True)]
    losses: dict[str, Any] = {}
    for name, values in sums.items():
        losses[name], losses[f"{name}_stderr"] = mean_by_chunk(values, counts)
    return TextLoss(**losses, tokens=sum(counts), chunks=len(chunks))


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Turn a model's adapters off while the block runs, however they were attached."""
    if isinstance(model, PeftModel):  # prompt tuning and similar methods have no layers
        with model.disable_adapter():
            yield
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = [layer for layer in layers if not layer.disable_adapters]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in active:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)


def _batch(chunks: list[list[int]], start: list[int], encoder_decoder: bool, device: Any) -> dict[str, torch.Tensor]:
    """Pad chunks on the right; `labels` has the tokens that count, and IGNORED elsewhere."""
    read = counted = [start + chunk for chunk in chunks]
    if encoder_decoder:
        read = [chunk[: len(chunk) // 2] for chunk in chunks]
        counted = [chunk[len(chunk) // 2 :] for chunk in chunks]
    batch = {
        "input_ids": _padded(read, 0),
        "attention_mask": _padded([[1] * len(row) for row in read], 0),
        "labels": _padded(counted, IGNORED),
    }
    return {name: value.to(device) for name, value in batch.items()}


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _row_losses(
    model: Any, batch: dict[str, torch.Tensor], targets: torch.Tensor, encoder_decoder: bool
) -> list[float]:
    """Compute the loss of each row, summed over its tokens in float32, which are few at a time."""
    inputs = batch if encoder_decoder else {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    logits = logits[:, -batch["input_ids"].shape[1] :]  # prompt tuning puts virtual tokens before the text
    logits = logits if encoder_decoder else logits[:, :-1]
    return [_summed(*row) for row in zip(logits, targets, strict=True)]


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> float:
    # All tokens at once are 7% slower: their float32 logits take 100 MB of new memory for 512 tokens and 49,152 words.
    pairs = zip(logits.split(TOKENS_AT_A_TIME), targets.split(TOKENS_AT_A_TIME), strict=True)
    return sum(
        float(F.cross_entropy(some.float(), wanted.to(some.device), ignore_index=IGNORED, reduction="sum"))
        for some, wanted in pairs
    )


def mean_by_chunk(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Compute the mean over all items, and its standard error over chunks, weighted by their items.

    Args:
        sums: sum of the values of each chunk.
        counts: number of items of each chunk, such as its tokens.
    """
    total, count = sum(counts), len(counts)
    mean = sum(sums) / total
    if count < 2:
        return mean, math.nan
    square = sum((value - mean * tokens) ** 2 for value, tokens in zip(sums, counts, strict=True))
    return mean, math.sqrt(square * count / (count - 1)) / total
