"""Check a run before its first step: what will train, what it will cost, and whether it can work at all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ...backbone.labeled import IGNORED, logits_at_labels
from ...backbone.modes import evaluating
from ...backbone.packed_rows import can_pack, takes_one_row
from ...data import ConversationCollator
from ...data.media import media_of
from ...tuner import CromeConfig, guard
from ...tuner.weights import DOWN, GATE
from ...utils.shorten import short
from ...vlm import CromeVLMForConditionalGeneration
from ..errors import RecipeError
from ..loop.trainer import CromeTrainer
from ..model.skeleton import host_skeleton, skeleton
from ..quantization import bits_of
from ..recipe.schema import Recipe
from ..stages import STAGES, count_trained, trained_parameters
from .costs import frozen_dtype
from .devices import Device, this_device
from .memory import NotPredictable, StepCost, StepSize, predict_step
from .padding import Padding, padding_of

SAMPLE = 256  # number of rows whose tokens are counted
STREAMED = 32  # number of rows if they have to be fetched

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSample:
    """Rows spread evenly over the data, measured by the headers of their files.

    Attributes:
        lengths: tokens of each row before a cut, including image tokens.
        max_length: length at which rows are cut; None: nowhere.
        media: the largest number of images, videos and sounds in a row.
        instruction_tokens, target_tokens: the largest number that a Q-Former or a decoder reads.
        label_tokens: the largest number of tokens with a label in a row.
        examples: the first row with each set of kinds of media; a row of text if no row has media.
    """

    lengths: list[int]
    max_length: int | None
    media: int
    instruction_tokens: int
    target_tokens: int
    label_tokens: int
    examples: list[dict[str, Any]]

    @property
    def cut(self) -> int:
        """Number of rows longer than `max_length`."""
        return sum(self.max_length is not None and length > self.max_length for length in self.lengths)

    @property
    def kept(self) -> list[int]:
        """Tokens of each row after the cut."""
        return [min(length, self.max_length or length) for length in self.lengths]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, after the cut."""
        return max(self.kept)


@dataclass(frozen=True)
class Preflight:
    """Results of `preflight`, known before the first step.

    Attributes:
        trained: number of weights that train, by part.
        rows: number of rows that train. None for streamed data.
        sample: a sample of the rows.
        size: size of a forward pass on one device, with rows as long as the sample's longest.
        cost: cost of that pass. If it is None, `warnings` has the reason.
        device: the device that the run uses.
        seconds: lower and upper estimate of an optimizer step, or None if unknown.
        padding: how much of a forward pass is padding; None for an encoder-decoder, whose rows are never packed.
        warnings: probable mistakes, each with the key to change.
    """

    trained: dict[str, int]
    rows: int | None
    sample: RowSample
    size: StepSize
    cost: StepCost | None
    device: Device
    seconds: tuple[float, float] | None
    padding: Padding | None
    warnings: list[str]


def preflight(
    trainer: CromeTrainer, recipe: Recipe, rows: Any, collator: ConversationCollator, count: int | None
) -> Preflight:
    """Check a run that is about to begin. Weights, gradients and random numbers are not changed.

    Args:
        trainer: trainer whose model is on the device where it will train.
        rows: the rows that the trainer draws from.
        count: number of rows in the data, without those that are left out; None: streamed.
    Raises:
        RecipeError: nothing trains, the forward pass does not reach the adapter, something that trains would get no
            gradient, or the model cannot batch all media of the data.
        RowError: a row of the sample cannot be learned from.
    """
    model, arguments = trainer.model, trainer.args
    trained = count_trained(model)
    if not trained:
        raise RecipeError(f"stage: nothing of this model trains in {recipe.stage!r}. Write another stage.")
    sample = sample_rows(rows, collator)
    warnings = [] if sample.media else _no_images(trained)
    label_tokens = None
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # with these, one process may not hold the model
        plain = copy.copy(collator)
        plain.augmentation = None  # it would draw random numbers
        alone = arguments.per_device_train_batch_size == 1 or len(sample.examples) == 1
        for examples in combinations(sample.examples, 1 if alone else 2):  # training batches are at least as large
            batch = trainer._prepare_inputs(plain(list(examples)))
            asked = logits_at_labels(model, batch)
            _check_batch(model, asked, examples)
            if recipe.training.packing:  # twice, since one row is packed with none
                can_pack(model, trainer._prepare_inputs(plain([*examples, *examples])))
            # Positions that rows share are more than one row's labels, so all logits are the bound then.
            if asked is not batch and asked["shift_labels"].dim() == 1 and not arguments.torch_compile:
                label_tokens = sample.label_tokens
    config, dtype = model.get_base_model().config, frozen_dtype(model)
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    device = this_device(arguments.device, mixed or dtype)
    each = arguments.per_device_train_batch_size
    read = (sample.instruction_tokens, sample.target_tokens, label_tokens)
    size = StepSize(each, sample.longest, each * sample.media, *read)
    settings = {
        "gradient_checkpointing": bool(arguments.activation_checkpointing),
        "accumulate": arguments.gradient_accumulation_steps > 1,
        "autocast": mixed,
    }
    cost, seconds, padding = None, None, None
    try:
        with torch.random.fork_rng(devices=[]):  # may build a tower whose layout depends on values
            adapter = model.peft_config[model.active_adapter]
            if isinstance(model.get_base_model(), CromeVLMForConditionalGeneration):
                shape = skeleton(config, STAGES[recipe.stage], adapter)
            else:  # only a row's tokens are known, not which are image tokens
                stored = getattr(config, "quantization_config", None)
                shape = host_skeleton(config, dtype, bits_of(stored), CromeConfig(branches=["text"]))
        cost = predict_step(shape, size, **settings)
        seconds = device.seconds(cost.flops * arguments.gradient_accumulation_steps, mixed or dtype)
        if cost.peak > device.memory:
            warnings.append(_too_large(cost.peak, device, size, recipe, config))
        warnings += _slow_dtype(device, mixed or dtype, recipe)
    except (NotPredictable, ValueError) as error:
        warnings.append(f"Memory and time are not predicted. {error}")
    for warning in warnings:
        logger.warning(warning)
    if not config.is_encoder_decoder:
        padding = padding_of(
            sample.kept,
            each,
            step=recipe.training.batch_size,
            max_length=recipe.training.max_length,
            total=count or 0,
            flash=takes_one_row(model),
        )
    return Preflight(trained, count, sample, size, cost, device, seconds, padding, warnings)


def _slow_dtype(device: Device, dtype: torch.dtype, recipe: Recipe) -> list[str]:
    if (recipe.backbones is None and recipe.model is None) or not {dtype, torch.float32} <= device.rates.keys():
        return []
    faster, name = device.rates[torch.float32] / device.rates[dtype], str(dtype).removeprefix("torch.")
    if faster < 2:
        return []
    section = "model" if recipe.model is not None else "backbones"
    return [
        f"{section}.dtype: {device.name} multiplies {faster:.0f} times as fast in float32 as in {name}. Write "
        "dtype: float32, which takes twice the memory for what is frozen."
    ]


def sample_rows(rows: Any, collator: ConversationCollator) -> RowSample:
    """Count the tokens of rows spread evenly over the data, or of the first rows of streamed data.

    Raises:
        ValueError: the data have no rows.
        RowError: as in `ConversationCollator.encode`.
    """
    if isinstance(rows, Dataset):
        chosen = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLE))[:SAMPLE])
    else:
        chosen = rows.take(STREAMED)
    lengths, most, instruction, target, labels = [], 0, 1, 1, 1
    examples: dict[frozenset[str], dict[str, Any]] = {}
    for row in chosen:
        encoded = collator.encode(row)
        lengths.append(encoded["length"])
        target = max(target, len(encoded["labels"]))
        labels = max(labels, sum(label != IGNORED for label in encoded["labels"]))
        reader = getattr(collator.processor, "qformer_tokenizer", None)
        media = media_of(row)
        if reader is not None and media:
            read = reader(encoded["instruction"])["input_ids"]
            instruction = max(instruction, len(read))
        most = max(most, sum(map(len, media.values())))
        examples.setdefault(frozenset(media), row)
    if not examples:
        raise ValueError("The data hold no rows. Name other data, or leave `faulty: drop` out to see why.")
    shown = [row for kinds, row in examples.items() if kinds or len(examples) == 1]
    return RowSample(lengths, collator.max_length, most, instruction, target, labels, shown)


def _check_batch(model: nn.Module, batch: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Check gradients with rows that show different media, since some models take no images beside videos."""
    try:
        check_gradients(model, batch)
    except ValueError as error:
        if isinstance(error, RecipeError) or len(rows) == 1:
            raise
        names = ", ".join(short(row["id"]) for row in rows)
        raise RecipeError(
            f"training.rows_per_device: the model takes no batch of rows {names}, which show different media "
            f"({error}). Write 1."
        ) from error


def check_gradients(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Run a batch forward and backward, and check that each branch is reached and each trained weight gets a gradient.

    Weights that take no part in a batch without images are then not checked.

    Raises:
        RecipeError: a branch is not reached or cannot learn, or weights get no gradient; the message names them.
    """
    base = model.get_base_model()  # type: ignore[operator]
    cache = getattr(base, "feature_cache", None)
    if cache is not None:
        base.feature_cache = None  # training may see this image differently
    try:
        try:
            silent = {report.branch for report in guard.check(model, batch) if not report.calls}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RecipeError(f"stage: the adapter would not train. {error}") from error
        with evaluating(model), torch.enable_grad():
            loss = model(**batch).loss
            if loss.requires_grad:  # with a Q-Former, text alone reaches nothing that trains
                loss.backward()
        # A batch without sound does not reach the branch for sound of a model with one.
        idle = tuple(f"{which}{branch}." for branch in silent for which in (GATE, DOWN))
        without = [
            name
            for _, name, parameter in trained_parameters(model)
            if parameter.grad is None and not any(part in name for part in idle)
        ]
    finally:
        if cache is not None:
            base.feature_cache = cache
        model.zero_grad()
    if without and any("pixel_values" in name for name in batch):
        raise RecipeError(
            f"stage: {len(without)} weights are to train and get no gradient from a row with an image: "
            f"{without[:4]}. The loss does not depend on them; write another stage, or leave their part out."
        )


def _no_images(trained: dict[str, int]) -> list[str]:
    blind = [part for part in trained if part != "adapter"]
    if not blind:
        return []
    return [f"data: no row of the sample has an image, so {', '.join(blind)} would learn nothing. Name other data."]


def _too_large(peak: int, device: Device, size: StepSize, recipe: Recipe, config: Any) -> str:
    ways = [f"training.rows_per_device: {max(1, size.rows // 2)}"] if size.rows > 1 else []
    if not recipe.training.gradient_checkpointing:
        ways.append("training.gradient_checkpointing: true")
    section = "model" if recipe.model is not None else "backbones"
    stored = getattr(config, "text_quantization_config", None) or getattr(config, "quantization_config", None)
    if not stored and recipe.previous is None:
        ways.append(f"{section}.quantization: 4bit")
    ways = ways or ["a smaller training.max_length"]
    return (
        f"A step is predicted to take {peak / 1e9:.1f} GB, and {device.name} has {device.memory / 1e9:.1f} GB for it. "
        f"Write {', or '.join(ways)}."
    )
