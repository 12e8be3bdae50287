"""Predict a training step's memory and floating-point operations from shapes alone.

The step runs forward and backward on tensors without values (torch's `FakeTensorMode`). Everything that an
architecture keeps for its backward pass is therefore counted, without a formula for it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from ...backbone.model import unwrapped
from ...vlm import CromeVLMForConditionalGeneration
from ..stages import ADAPTER

ADAM_STATES = 2  # states of AdamW per trained weight, in its dtype

CPU_ATTENTION = {  # torch's counter leaves these out; it wraps a formula itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}


class NotPredictable(RuntimeError):
    """A model's forward pass depends on values, or fails without them."""


@dataclass(frozen=True)
class StepSize:
    """A forward and backward pass.

    Args:
        rows: number of rows.
        tokens: tokens of the longest row, with its image tokens. The others are padded to it.
        images: images in all rows together.
        instruction_tokens: tokens of the longest instruction that a Q-Former reads.
        target_tokens: tokens of the longest answer, for an encoder-decoder.
        label_tokens: tokens of a row that have a label, if logits are computed for these alone. None if they are
            computed for all.
    """

    rows: int
    tokens: int
    images: int
    instruction_tokens: int = 32
    target_tokens: int = 32
    label_tokens: int | None = None


@dataclass(frozen=True)
class StepCost:
    """Cost of a step on one device that holds the whole model. Memory is in bytes.

    Attributes:
        weights: weights of each part of the model. Quantized ones count as packed.
        optimizer: states of AdamW.
        gradients: gradients of the weights that train.
        kept: activations that the forward pass keeps for the backward pass.
        peak: the highest memory at one time, with all of the above.
        flops: floating-point operations of a forward and a backward pass. A multiply-add counts as two.
    """

    weights: dict[str, int]
    optimizer: int
    gradients: int
    kept: int
    peak: int
    flops: int

    @property
    def activations(self) -> int:
        """Memory at the peak beside weights and the optimizer's states, including gradients."""
        return self.peak - sum(self.weights.values()) - self.optimizer


class _Live(TorchDispatchMode):
    """Count the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen.add(storage)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def predict_step(
    model: nn.Module,
    size: StepSize,
    *,
    gradient_checkpointing: bool = False,
    accumulate: bool = False,
    autocast: torch.dtype | None = None,
) -> StepCost:
    """Predict the cost of a training step by running it on the meta device.

    Args:
        model: a model of `recipe_skeleton` or `model_skeleton`, or any other adapted model that takes text. Its
            gradient checkpointing is changed, and it is left in training mode.
        size: size of the batch.
        gradient_checkpointing: recompute activations in the backward pass, and keep one per layer.
        accumulate: whether gradients of earlier rows exist already.
        autocast: dtype of mixed precision, as accelerate uses it. None means no mixed precision.
    Raises:
        NotPredictable: the forward pass needs values (some mixtures of experts), or fails for another reason.
    """
    if gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    model.train()
    live, flops = _Live(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    optimizer = ADAM_STATES * gradients
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _fake(model) as tensors:
            for tensor in tensors:
                live.add(tensor)
            weights = live.now
            batch: dict[str, Any] = _batch(model, size)
            if gradient_checkpointing:
                batch["use_cache"] = False  # transformers would set it and warn each time
            with live, flops:
                if accumulate:
                    for tensor in tensors:
                        if tensor.requires_grad:
                            tensor.grad = torch.empty_like(tensor)
                before = live.now
                loss = _forward(model, autocast)(**batch).loss
                kept = live.now - before
                if loss.requires_grad:  # with a Q-Former, text alone reaches nothing that trains
                    loss.backward()
    except (RuntimeError, NotImplementedError) as error:  # torch raises RuntimeErrors for missing values
        raise NotPredictable(
            f"A step of {type(model).__name__} cannot be rehearsed without values: {error}"
        ) from error
    return StepCost(
        weights=_by_part(model),
        optimizer=optimizer,
        gradients=gradients,
        kept=kept,
        peak=optimizer + max(live.peak, weights + gradients),
        flops=flops.get_total_flops(),
    )


@contextmanager
def _fake(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Replace tensors on the meta device by ones that claim to be on the CPU, and remove these afterwards."""
    fakes: dict[str, torch.Tensor] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        fake = torch.empty_like(tensor, device="cpu")
        fakes[name] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    with _reparametrize_module(model, fakes, tie_weights=True):
        yield list(fakes.values())


def _batch(model: nn.Module, size: StepSize) -> dict[str, torch.Tensor]:
    ids = torch.zeros(size.rows, size.tokens, dtype=torch.long)
    base = unwrapped(model)
    target = (size.rows, size.target_tokens) if base.config.is_encoder_decoder else ids.shape
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(target, dtype=torch.long)}
    if size.label_tokens is not None:
        batch["logits_to_keep"] = torch.arange(size.label_tokens)
        batch["shift_labels"] = torch.zeros(size.rows, size.label_tokens, dtype=torch.long)
    if isinstance(base, CromeVLMForConditionalGeneration) and size.images:
        channels = getattr(base.config.vision_config, "num_channels", 3)
        batch["pixel_values"] = torch.empty(size.images, channels, *base.config.image_height_width)
        if base.qformer is not None and base.qformer.reads_instructions:
            longest = min(size.instruction_tokens, base.qformer.config.max_position_embeddings)
            read = torch.zeros(size.images, longest, dtype=torch.long)
            batch |= {"qformer_input_ids": read, "qformer_attention_mask": torch.ones_like(read)}
    return batch


def _forward(model: nn.Module, autocast: torch.dtype | None) -> Any:
    return model if autocast is None else convert_outputs_to_fp32(torch.autocast("cpu", dtype=autocast)(model))


def _by_part(model: nn.Module) -> dict[str, int]:
    """Count bytes per child of the base model, each tensor once; the adapter's as "adapter"."""
    base, parts = unwrapped(model), Counter[str]()
    for name, tensor in chain(base.named_parameters(), base.named_buffers()):
        part = name.split(".")[0]
        parts[ADAPTER if part == "crome" else part] += tensor.nbytes
    return dict(parts)
