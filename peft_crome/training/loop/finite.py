"""A loss or a gradient that is no number any more stops the run before it reaches the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset

ROW_IDS = "row_ids"  # of a batch: (rows, bytes), their ids in UTF-8, padded with zeros
LONGEST_ID = 200  # bytes
SHOWN = 32  # rows in a message
SMALLEST_SCALE = 2.0**-14  # of fp16's loss; PyTorch's scaler begins at 2**16 and halves it at each overflow


class NotFiniteError(ValueError):
    """A step's loss or gradient is NaN or infinite. The weights are those before the step.

    Args:
        step: Number of the step, counted from 1.
        what: "the loss" or "the gradient".
        rows: Ids of the rows in the step.
        checkpoint: The last checkpoint, if there is one.
        paths: Paths of the data sets that hold the rows.
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
        """The same, with the data sets named."""
        return NotFiniteError(self.step, self.what, self.rows, self.checkpoint, paths)


class NamedRows:
    """A collator whose batches also name their rows. `CromeTrainer` does not pass the names to the model.

    Args:
        collator: A collator of rows with an "id".
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        return {**batch, ROW_IDS: encode_ids([row["id"] for row in rows])} if batch else batch


def encode_ids(ids: Sequence[str]) -> torch.Tensor:
    """Ids as a tensor, which every way of sending batches to processes can carry: (rows, bytes), uint8."""
    texts = [name.encode(errors="replace")[:LONGEST_ID] for name in ids]
    longest = max(map(len, texts))
    return torch.tensor([list(text.ljust(longest, b"\0")) for text in texts], dtype=torch.uint8)


def decode_ids(ids: torch.Tensor) -> list[str]:
    """The ids of `encode_ids`.

    Example:
        >>> decode_ids(encode_ids(["7", "coco/12"]))
        ['7', 'coco/12']
    """
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in ids.tolist()]


class FiniteCheck:
    """Collects the losses of a step's batches, and looks at them and the gradient before the optimizer does."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.rows: list[torch.Tensor | None] = []

    def see(self, loss: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Note a batch; nothing is waited for."""
        self.losses.append(loss.detach().float())
        self.rows.append(rows)

    def check(self, norm: Any, accelerator: Accelerator, step: int, directory: str) -> None:
        """Raise on all processes alike if a batch of any of them is not finite.

        Args:
            norm: of the gradient, before it was clipped.
            accelerator: of the Trainer.
            step: that is being done, from 1.
            directory: of the checkpoints.
        Raises:
            NotFiniteError: a loss is NaN or infinite; or the gradient is, but for overflows under fp16, at which the
                loss is scaled down and the step left out.
        """
        losses, rows = self.losses, self.rows
        self.losses, self.rows = [], []
        if not losses:
            return
        finite = torch.stack(losses).isfinite()
        norm = 0.0 if norm is None else norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # DeepSpeed, FSDP
        gradient = torch.as_tensor(norm).isfinite()
        scaler = accelerator.scaler
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE:
            gradient = torch.ones_like(gradient)
        sound = (finite.all() & gradient.to(finite.device).all()).float()
        if accelerator.num_processes > 1:  # whoever stopped alone would leave the others waiting
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
    """The last checkpoint of a step before; a run that was killed may have left a later one half-written."""
    checkpoints = {
        int(p.name.split("-")[-1]): p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()
    }
    earlier = [number for number in checkpoints if number < step]
    return str(checkpoints[max(earlier)]) if earlier else None


def paths_of(rows: Iterable[str], sources: Iterable[tuple[str, Any]]) -> list[str]:
    """The data sets that hold any of the rows; one that is streamed may.

    Args:
        rows: ids.
        sources: path and `load_rows`'s data set of each; a path may come twice, as of two splits.
    """
    wanted = set(rows)

    def holds(source: Any) -> bool:
        return not isinstance(source, Dataset) or not wanted.isdisjoint(source["id"])

    return list(dict.fromkeys(path for path, source in sources if holds(source)))
