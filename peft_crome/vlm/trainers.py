"""What a `transformers.Trainer`, and TRL's above all, must know of a composite before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backbone.model import unwrapped
from ..backbone.trainers import CHECKS
from .language_head import decoder_of
from .modeling_crome_vlm import CromeVLMForConditionalGeneration


def prepare(trainer: Any) -> None:
    """Refuse what would train another model than the one that is meant; called once a trainer is made.

    Raises:
        ValueError: vLLM does not know the composite, or a trainer of TRL's runs a composite in a way that its
            language model or its Q-Former has no answer to.
    """
    model = trainer.model
    if getattr(trainer.args, "use_vllm", False) and any(
        isinstance(m, CromeVLMForConditionalGeneration) for m in model.modules()
    ):
        raise ValueError("use_vllm=True: vLLM does not know this composite model. Write use_vllm=False.")
    host = unwrapped(model)
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
    if hasattr(trainer.data_collator, "processor"):  # reads images; its labels are the ids
        trainer.data_collator = WithoutImageLabels(trainer.data_collator, host.config.image_token_id)


class WithoutImageLabels:
    """A collator whose labels leave out image placeholders, as the composite's own loss does.

    TRL computes the loss from hidden states, and a placeholder's id may lie outside the vocabulary.

    Args:
        collate: the collator itself; its attributes are this one's too.
        image_token_id: of the placeholders.
    """

    def __init__(self, collate: Callable[[Any], Any], image_token_id: int) -> None:
        self.collate = collate
        self.image_token_id = image_token_id

    def __call__(self, rows: Any) -> Any:
        """The collator's batch."""
        batch = self.collate(rows)
        labels = batch.get("labels") if hasattr(batch, "get") else None
        if labels is not None:
            batch["labels"] = labels.masked_fill(labels == self.image_token_id, -100)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name in ("collate", "__setstate__"):  # while it is unpickled, by a worker of the data loader
            raise AttributeError(name)
        return getattr(self.collate, name)


CHECKS.append(prepare)
