"""Prepare a `transformers.Trainer`, and TRL's above all, for a composite before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backbone.model import unwrapped
from ..backbone.trainers import CHECKS
from .language_head import decoder_of
from .modeling_crome_vlm import CromeVLMForConditionalGeneration


def prepare(trainer: Any) -> None:
    """Refuse settings that would train another model than intended. Called once a trainer is made.

    Raises:
        ValueError: a TRL trainer runs a composite in a way that its language model or its Q-Former does not support.
    """
    host = unwrapped(trainer.model)
    of_trl = any(cls.__module__.split(".")[0] == "trl" for cls in type(trainer).__mro__)
    if not of_trl or not isinstance(host, CromeVLMForConditionalGeneration):
        return
    decoder_of(host.language_model)
    if hasattr(trainer.args, "num_generations") and host.qformer is not None and host.qformer.reads_instructions:
        raise ValueError(
            f"{type(trainer).__name__} does not hand on the instructions that this Q-Former reads "
            "(qformer_input_ids). Train it with SFTTrainer or DPOTrainer, or take a Q-Former that reads images alone: "
            "qformer_config=Blip2QFormerConfig(...)."
        )
    if hasattr(trainer.data_collator, "processor"):  # it reads images, and its labels are the ids
        trainer.data_collator = WithoutImageLabels(trainer.data_collator, host.config.image_token_id)


class WithoutImageLabels:
    """A collator whose labels leave out image placeholders, as the composite's loss does.

    TRL computes the loss from hidden states, and a placeholder's id may lie outside the vocabulary.

    Args:
        collate: the collator to wrap. Its attributes stay available.
        image_token_id: id of the placeholders.
    """

    def __init__(self, collate: Callable[[Any], Any], image_token_id: int) -> None:
        self.collate = collate
        self.image_token_id = image_token_id

    def __call__(self, rows: Any) -> Any:
        """Collate rows without labels at image placeholders."""
        batch = self.collate(rows)
        if (labels := batch.get("labels")) is not None:
            batch["labels"] = labels.masked_fill(labels == self.image_token_id, -100)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name in ("collate", "__setstate__"):  # while a worker of the data loader unpickles it
            raise AttributeError(name)
        return getattr(self.collate, name)


CHECKS.append(prepare)
