"""Compute logits only where there are labels: the output head skips all other tokens."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from .compat import keeps_logits_by_token
from .model import COMPILED, KNOWN_ROWS, placeholder_ids, text_config, unwrapped
from .modes import trying

IGNORED = -100
TOLERANCE = 1e-2  # between losses of two kernels in bfloat16; wrong positions fail by shape

Choice = Callable[[torch.Tensor], dict[str, torch.Tensor]]

logger = logging.getLogger(__name__)
_choices: WeakKeyDictionary[nn.Module, Choice | None] = WeakKeyDictionary()


def logits_at_labels(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Request logits at the tokens that predict a label. The loss and its gradient do not change.

    Write `loss = model(**logits_at_labels(model, batch)).loss` in your training loop. The model computes the loss
    itself, with its scales, caps, biases and auxiliary losses. Images, questions and padding cost nothing in the
    output head, in the loss and in their gradients.

    The first call tries the model on two short rows of text, without a gradient and without drawing random numbers.
    A model whose loss changes, or that has no such argument, is trained on all logits, and the log gives the reason.
    In a run of several processes, each of them must make this call.

    Args:
        model: the model that the loop calls. It may be wrapped by DDP, FSDP, DeepSpeed or `torch.compile`.
        batch: arguments of `model(**batch)`; "labels", (batch, tokens), are those of the tokens themselves; -100 marks
            a token without a label.
    Returns:
        The batch with `logits_to_keep` and `shift_labels`. The model's `logits` are then (labels, vocabulary). With
        `torch.compile`, before transformers 5.21, or if the model takes no mask of tokens, they are (batch, positions
        with a label in any row, vocabulary).
        The batch is unchanged if it has no labels, has one of these keys, or the model takes none of them.
    """
    labels = batch.get("labels")
    if labels is None or not {"logits_to_keep", "shift_labels"}.isdisjoint(batch):
        return batch
    if model not in _choices:
        _choices[model] = _choice_of(model, labels.device)
    choice = _choices[model]
    return batch if choice is None else {**batch, **choice(labels)}


def _by_token(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep each token before a label."""
    targets, wanted = _targets(labels)
    return {"logits_to_keep": wanted, "shift_labels": targets[wanted]}


def _by_place(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep each position before a label of any row, since a compiled graph cannot count tokens by value."""
    targets, wanted = _targets(labels)
    places = wanted.any(dim=0).nonzero().flatten()
    return {"logits_to_keep": places, "shift_labels": targets[:, places]}


def _targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each token predicts, (batch, tokens), and a mask where that is a label.

    In a batch without labels the first token is kept, so that the loss still depends on the model.
    """
    targets = targets_of(labels)
    wanted = targets != IGNORED
    wanted[0, 0] |= ~wanted.any()
    return targets, wanted


def targets_of(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each token predicts, (batch, tokens)."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _choice_of(model: nn.Module, device: torch.device) -> Choice | None:
    """Find the first way to choose tokens that a model takes; None, with a line in the log, if it takes none."""
    host = unwrapped(model)
    compiled = any(COMPILED in module._modules or module._compiled_call_impl for module in model.modules())
    choices = (_by_token, _by_place) if keeps_logits_by_token() and not compiled else (_by_place,)
    because = _no_argument(host)
    for choice in choices if because is None else ():
        because = _trial(model, host, choice, device)
        if because is None:
            return choice
    logger.warning("%s computes the logits of all tokens in training: %s.", type(host).__name__, because)
    return None


def _no_argument(host: nn.Module) -> str | None:
    """Return why a model's class rules out chosen logits; None if it may take them."""
    if getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        return "the labels of an encoder-decoder are all that its decoder reads"
    if "logits_to_keep" not in inspect.signature(type(host).forward).parameters:
        return "its forward has no argument logits_to_keep"
    if text_config(host) is None:
        return "its configuration names no vocabulary"
    return None


def _trial(model: nn.Module, host: nn.Module, choose: Choice, device: torch.device) -> str | None:
    """Compare both losses on two rows of text. All processes of a run do the same, whatever their rows."""
    size, taken = text_config(host).vocab_size, placeholder_ids(host)
    words = [number % size for number in KNOWN_ROWS if number % size not in taken]
    ids = torch.tensor([words, words[::-1]], device=device)
    labels = ids.clone()
    labels[0, :-3] = labels[1, :-1] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    chosen = choose(labels)
    try:
        with trying(model):
            whole, kept = model(**batch), model(**batch, **chosen)
        loss, again, logits = whole["loss"], kept["loss"], kept["logits"]
    except torch.OutOfMemoryError:  # a RuntimeError, which says nothing about the model
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        return f"it does not take them at chosen tokens ({error})"
    if logits.shape[:-1] != chosen["shift_labels"].shape:
        return "it takes logits_to_keep and keeps all"
    if not torch.isclose(again, loss, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        return f"its loss at chosen tokens is {again:.4f} instead of {loss:.4f}"
    return None
