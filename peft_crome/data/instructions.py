"""What a Q-Former reads of a conversation: what the user says in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import Fault, RowError


def instruction_of(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The text of the user's turns, as the processor writes it for a Q-Former."""
    parts = (part for message in messages if message["role"] == "user" for part in message["content"])
    return processor.instruction([part["text"] for part in parts if part["type"] == "text"])


def check_instruction(processor: Any, name: str, instruction: str, limit: int | None) -> None:
    """See that a Q-Former can read the instruction of a row with pictures.

    Args:
        limit: tokens that it has positions for; None: any number.
    Raises:
        RowError: it is too long; the message names the row.
    """
    if limit is None or processor.qformer_tokenizer is None:
        return
    read = len(processor.qformer_tokenizer(instruction)["input_ids"])
    if read > limit:
        message = (
            f"the instruction has {read} tokens, and the Q-Former reads {limit}. Shorten it, or take the row out."
        )
        raise RowError(f"Row {name!r}", [Fault("long", message)])


def check_instructions(processor: Any, config: Any, rows: Sequence[dict[str, Any]]) -> None:
    """See that a Q-Former can read all instructions, before any row is answered.

    Args:
        config: the composite's.
    Raises:
        RowError: as `check_instruction`.
    """
    limit = getattr(config.qformer_config, "max_position_embeddings", None)
    for row in rows:
        if row["images"]:
            check_instruction(processor, row["id"], instruction_of(processor, row["messages"]), limit)
