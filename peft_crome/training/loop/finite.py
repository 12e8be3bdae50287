"""Stop a run at a loss or gradient that is not finite, before it reaches the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from datasets import Dataset

from ..directory.run_folder import checkpoints_of

ROW_IDS = "row_ids"  # key of a batch: (rows, bytes), ids in UTF-8, padded with zeros
LONGEST_ID = 200  # bytes
SHOWN = 32  # number of rows in a message
SMALLEST_SCALE = 2.0**-14  # loss scale of fp16; PyTorch begins at 2**16 and halves it at each overflow


class NotFiniteError(ValueError):
    """A step's loss or gradient is NaN or infinite. The weights are those before the step.

    Args:
        step: number of the step, counted from 1.
        what: "the loss" or "the gradient".
        rows: ids of the rows in the step.
        checkpoint: the last checkpoint, if there is one.
        paths: paths of the data sets that hold the rows.
    """

    def __init__(
        self, step: int, what: str, rows: Sequence[str], checkpoint: str | None, paths: Sequence[str] = ()
    ) -> None:
        self.step, self.what, self.rows, self.checkpoint, self.paths = step, what, list(rows), checkpoint, list(paths)
        shown = ", ".join(map(repr, self.rows[:SHOWN])) + (", ..." if len(self.rows) > SHOWN else "")
        of = f" of {' or '.join(self.paths)}" if self.paths else ""
        kept = f"The last checkpoint, {checkpoint}, is from before it." if checkpoint else "No checkpoint was written."
        super().__init__(
            f"Step {step}: {what} is NaN or infinite, from the rows {shown or '(unknown)'}{of}. The run has stopped "
            f"before the weights were changed. {kept} Look at these rows with peft-crome doctor; a lower "
            "training.learning_rate, a longer warm-up, or bf16 instead of fp16 are the other remedies."
        )

    def of(self, paths: Sequence[str]) -> NotFiniteError:
        """Return the same error with the data sets named."""
        return NotFiniteError(self.step, self.what, self.rows, self.checkpoint, paths)


class NamedRows:
    """Wrap a collator so that batches also name their rows. `CromeTrainer` does not pass the names to the model.

    Args:
        collator: collator of rows with an "id".
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        return {**batch, ROW_IDS: encode_ids([row["id"] for row in rows])} if batch else batch


def encode_ids(ids: Sequence[str]) -> torch.Tensor:
    """Encode ids as a tensor, which every way to send batches to processes supports: (rows, bytes), uint8."""
    texts = [name.encode(errors="replace")[:LONGEST_ID] for name in ids]
    longest = max(map(len, texts))
    return torch.tensor([list(text.ljust(longest, b"\0")) for text in texts], dtype=torch.uint8)


def decode_ids(ids: torch.Tensor) -> list[str]:
    """Invert `encode_ids`.

    Example:
        >>> decode_ids(encode_ids(["7", "coco/12"]))
        ['7', 'coco/12']
    """
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in ids.tolist()]


class FiniteCheck:
    """Collect the losses of a step's batches, and check them and the gradient before the optimizer runs."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.rows: list[torch.Tensor | None] = []

    def see(self, loss: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Note a batch, without waiting for the device."""
        self.losses.append(loss.detach().float())
        self.rows.append(rows)

    def check(self, norm: Any, accelerator: Accelerator, step: int, directory: str) -> None:
        """Raise on all processes if a batch of any process is not finite.

        Args:
            norm: norm of the gradient, before it is clipped.
            accelerator: accelerator of the Trainer.
            step: number of the current step, from 1.
            directory: directory of the checkpoints.
        Raises:
            NotFiniteError: a loss is NaN or infinite, or the gradient is. Under fp16 an overflow of the gradient
                reduces the loss scale and skips the step, and raises only at the smallest scale.
        """
        losses, rows = self.losses, self.rows
        self.losses, self.rows = [], []
        if not losses:
            return
        finite = torch.stack(losses).isfinite()
        norm = 0.0 if norm is None else norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # DeepSpeed, FSDP
        gradient = torch.as_tensor(norm).isfinite()
        scaler = accelerator.scaler
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            scales = accelerator.mixed_precision == "fp16"  # it raises at its own smallest scale
        else:
            scales = scaler is not None and scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE
        if scales:
            gradient = torch.ones_like(gradient)
        sound = (finite.all() & gradient.to(finite.device).all()).float()
        if accelerator.num_processes > 1:  # a process that stopped alone would leave the others waiting
            sound = accelerator.reduce(sound, reduction="mean")
        if sound.item() == 1:
            return
        here = [(bool(good), decode_ids(ids)) for good, ids in zip(finite, rows, strict=True) if ids is not None]
        batches = gather_object(here)
        lost = gather_object([not bool(finite.all())])
        blamed = [names for good, names in batches if not good] or [names for _, names in batches]
        what = "the loss" if any(lost) else "the gradient"
        raise NotFiniteError(step, what, [name for names in blamed for name in names], _last_before(step, directory))


def _last_before(step: int, directory: str) -> str | None:
    """Find the last checkpoint before a step. A killed run may have left a later, incomplete one."""
    earlier = {number: path for number, path in checkpoints_of(Path(directory)).items() if number < step}
    return str(earlier[max(earlier)]) if earlier else None


def paths_of(rows: Iterable[str], sources: Iterable[tuple[str, Any]]) -> list[str]:
    """Find the data sets that hold any of the rows; a streamed one may.

    Args:
        rows: ids of rows.
        sources: path and `load_rows` data set of each; a path may occur twice, for two splits.
    """
    wanted = set(rows)

    def holds(source: Any) -> bool:
        return not isinstance(source, Dataset) or not wanted.isdisjoint(source["id"])

    return list(dict.fromkeys(path for path, source in sources if holds(source)))
