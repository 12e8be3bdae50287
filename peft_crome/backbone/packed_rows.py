"""Pack the rows of a batch: several conversations share one row in place of padding, and none reads another."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .labeled import IGNORED, logits_at_labels, targets_of
from .model import text_config, unwrapped
from .modes import trying

Bins = list[list[int]]  # the rows that share each packed row
Fit = Callable[[Sequence[int], int], Bins]

logger = logging.getLogger(__name__)
# Keys of batches that a model was tried with; None for a model that failed.
_proven: WeakKeyDictionary[nn.Module, set[str] | None] = WeakKeyDictionary()


def pack_rows(model: nn.Module, batch: Mapping[str, Any], max_length: int | None = None) -> Mapping[str, Any]:
    """Put several conversations of a padded batch into one row. The loss and its gradient do not change.

    Write `loss = model(**pack_rows(model, batch)).loss` in your training loop. Positions restart with each
    conversation, and there is no attention mask, from which transformers' models build a mask of blocks. The rows keep
    their order, and with it the order of their images. Flash attention gets all conversations in one row, which has
    no padding.

    A batch whose keys are new is tried first, in both forms and without a gradient. A model whose logits change is
    trained on padded rows, and the log gives the reason. A model that is sharded (FSDP, ZeRO-3) must not be packed,
    since its processes would not try at the same time.

    Args:
        model: the model that the loop calls. It may be wrapped by DDP or `torch.compile`.
        batch: arguments of `model(**batch)`; "input_ids", "attention_mask" and "labels" are (rows, tokens).
        max_length: number of tokens of a packed row. None: that of the longest conversation. With flash attention, all
            conversations are in one row.
    Returns:
        The batch in fewer or shorter rows, with `position_ids` and without `attention_mask`.
        The batch is unchanged if it lacks one of these keys, has `position_ids`, or would have as many tokens.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or "position_ids" in batch or not {"input_ids", "labels"} <= batch.keys():
        return batch
    host = unwrapped(model)
    lengths = mask.sum(dim=1).tolist()
    bins = [list(range(len(lengths)))] if takes_one_row(model) else fullest(lengths, max_length, next_fit)
    if area(lengths, bins) >= mask.numel() or not _is_proven(host, batch, bins):
        return batch
    return _packed(host, batch, bins)


def can_pack(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Try a model with all rows of a batch in one row, unless it was tried with these keys. The log has a reason."""
    return _is_proven(unwrapped(model), batch, [list(range(len(batch["input_ids"])))])


def fullest(lengths: Sequence[int], max_length: int | None, fit: Fit) -> Bins:
    """Choose bins whose padded rows have the fewest tokens; of equal ones, the shortest, which attend to less.

    Args:
        lengths: tokens of each conversation.
        max_length: tokens that a bin may have, unless one conversation has more; None: those of the longest.
        fit: puts conversations into bins of a size.
    """
    longest = max(lengths)
    size = max(longest, max_length or longest)
    best = fit(lengths, size)
    while size >= longest:
        bins = fit(lengths, size)
        if area(lengths, bins) <= area(lengths, best):
            best = bins
        size = _width(lengths, bins) - 1
    return best


def next_fit(lengths: Sequence[int], size: int) -> Bins:
    """Fill bins one after another, so that conversations keep their order.

    Example:
        >>> next_fit([5, 3, 2, 6], 8)
        [[0, 1], [2, 3]]
    """
    bins: Bins = []
    left = -1
    for row, length in enumerate(lengths):
        if length > left:
            bins.append([])
            left = size
        bins[-1].append(row)
        left -= length
    return bins


def best_fit(lengths: Sequence[int], size: int) -> Bins:
    """Put each conversation, longest first, into the fullest bin that it fits into.

    Example:
        >>> best_fit([5, 3, 2, 6], 8)
        [[3, 2], [0, 1]]
    """
    bins: Bins = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [number for number, space in enumerate(left) if space >= lengths[row]]
        number = min(fitting, key=left.__getitem__, default=len(bins))
        if number == len(bins):
            bins.append([])
            left.append(size)
        bins[number].append(row)
        left[number] -= lengths[row]
    return bins


def area(lengths: Sequence[int], bins: Bins) -> int:
    """Return the tokens of a batch of such bins, with padding."""
    return len(bins) * _width(lengths, bins)


def _width(lengths: Sequence[int], bins: Bins) -> int:
    return max(sum(lengths[row] for row in rows) for rows in bins)


def takes_one_row(model: nn.Module) -> bool:
    """Whether attention is flash attention, for which transformers finds boundaries in a single row alone."""
    return "flash" in str(getattr(text_config(model), "_attn_implementation", None))


def _packed(host: nn.Module, batch: Mapping[str, Any], bins: Bins) -> dict[str, Any]:
    """Rearrange each value that has a number per token. Padding between bins is copied from the batch's padding."""
    mask, shape = batch["attention_mask"].bool(), batch["input_ids"].shape
    counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # padding on the left comes before the first
    lengths = mask.sum(dim=1).tolist()
    tokens = mask.flatten().nonzero().flatten()
    parts = tokens.split([sum(lengths[row] for row in rows) for rows in bins])
    source = pad_sequence(list(parts), batch_first=True, padding_value=int(mask.flatten().long().argmin()))
    first = mask & (counted == 0)  # predicted by no token, and certainly not by another conversation's last one
    values = {**batch, "labels": batch["labels"].masked_fill(first, IGNORED)}
    del values["attention_mask"]
    packed = {
        name: value.flatten(0, 1)[source] if isinstance(value, torch.Tensor) and value.shape[:2] == shape else value
        for name, value in values.items()
    }
    positions = _positions(host, batch, counted)
    # A cache would keep transformers from looking for boundaries.
    return {**packed, "position_ids": positions.flatten(-2)[..., source], "use_cache": False}


def _positions(host: nn.Module, batch: Mapping[str, Any], counted: torch.Tensor) -> torch.Tensor:
    """Return the positions in a padded batch: (rows, tokens), or (4, rows, tokens) for Qwen-VL and its kin.

    The first of the four is counted in text, and shows the boundaries. The others are the host's own: time, height
    and width.
    """
    part = next((module for module in host.modules() if hasattr(module, "get_rope_index")), None)
    if part is None:
        return counted
    parameters = inspect.signature(part.get_rope_index).parameters.values()
    arguments = {each.name: batch[each.name] for each in parameters if each.name in batch}
    shown = any(name.endswith("grid_thw") for name in arguments)
    grids = part.get_rope_index(**arguments)[0] if shown else counted.expand(3, *counted.shape)
    return torch.cat([counted[None], grids.to(counted)])


def _is_proven(host: nn.Module, batch: Mapping[str, Any], bins: Bins) -> bool:
    """Whether a model's logits stay the same in packed rows; tried once for each new key of a batch."""
    proven = _proven.setdefault(host, set())
    if proven is not None and not batch.keys() <= proven:
        if not (batch["labels"] != IGNORED).any():
            return False  # nothing would be compared
        because = _trial(host, batch, bins)
        if because is None:
            proven.update(batch)
        else:
            logger.warning("%s is trained on padded rows, not on packed ones: %s.", type(host).__name__, because)
            _proven[host] = proven = None
    return proven is not None


def _trial(host: nn.Module, batch: Mapping[str, Any], bins: Bins) -> str | None:
    """Compare the logits of a batch before and after. The host itself is called, since DDP waits for its processes."""
    if getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        return "an encoder-decoder reads each row apart"
    if getattr(text_config(host), "output_router_logits", False):
        return "the loss of its routers would count the padding between rows"
    try:
        packed = _after_text(_packed(host, batch, bins))
        asked = [logits_at_labels(host, form) for form in (batch, packed)]
        with trying(host):
            before, after = (_of_labels(host(**form)["logits"], form) for form in asked)
    except torch.OutOfMemoryError:  # a RuntimeError, which says nothing about the model
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        return f"it does not take them ({error})"
    if before.shape != after.shape:
        return f"its logits are {tuple(after.shape)} instead of {tuple(before.shape)}"
    dtype = torch.finfo(before.dtype)
    excluded = before <= dtype.min / 2  # words that a model rules out
    change, size = ((x.float().masked_fill(excluded, 0)).norm() for x in (after - before, before))
    if not change <= dtype.eps**0.5 * size:
        return f"its logits change by {change / size:.1%}"
    return None


def _after_text(packed: dict[str, Any]) -> dict[str, Any]:
    """Put a text without labels before each packed row, so that no image is where a row of its own would have it.

    Otherwise conversations of one form would prove a mask of images that counts from each conversation's first token
    and looks at the row's, as Gemma 3's in transformers 5.23.
    """
    shape = packed["input_ids"].shape
    counted = torch.arange(shape[1], device=packed["input_ids"].device)
    words = packed["labels"][packed["labels"] != IGNORED]
    before = {"input_ids": words[counted % len(words)], "labels": torch.full_like(counted, IGNORED)}
    shifted = {
        name: torch.cat([before.get(name, torch.zeros_like(counted)).expand(shape).to(value), value], dim=1)
        if isinstance(value, torch.Tensor) and value.shape == shape
        else value
        for name, value in packed.items()
    }
    positions = packed["position_ids"]
    return {**shifted, "position_ids": torch.cat([counted.expand(positions.shape), positions], dim=-1)}


def _of_labels(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the logits that predict a label, (labels, vocabulary)."""
    targets = batch["shift_labels"] if "shift_labels" in batch else targets_of(batch["labels"])
    return logits[targets != IGNORED]
