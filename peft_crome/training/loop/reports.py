"""Keep TensorBoard's files of a run."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer
from transformers.integrations import TensorBoardCallback


def keep_reports(trainer: Trainer, output: Path) -> None:
    """Write TensorBoard's files beside the stage's directory, not among the checkpoints, which are removed at the end.

    Args:
        trainer: with `report_to="tensorboard"`, or without.
        output: the stage's directory; the files go to OUTPUT.tensorboard, unless TENSORBOARD_LOGGING_DIR is set.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output.with_name(f"{output.name}.tensorboard"))
