"""Refuse what a `transformers.Trainer` cannot do with an adapter on its model."""

from __future__ import annotations

from typing import Any

from ..backbone.trainers import CHECKS
from .layer import crome_layers


def refuse_vllm(trainer: Any) -> None:
    """Refuse generation by vLLM. TRL sends it merged weights, which do not contain a vision branch.

    Raises:
        ValueError: use_vllm is set; names what to write.
    """
    if getattr(trainer.args, "use_vllm", False) and any(True for _ in crome_layers(trainer.model)):
        raise ValueError(
            "use_vllm=True: vLLM would generate without the CROME adapter. TRL sends it the weights after a merge, "
            "and the branches that read images are modules which cannot be merged. Write use_vllm=False."
        )


CHECKS.append(refuse_vllm)
