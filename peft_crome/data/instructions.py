"""Check the instructions that a Q-Former reads: the user's words in a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import row_error


def check_instruction(processor: Any, name: str, instruction: str, limit: int | None) -> None:
    """Check that a Q-Former can read the instruction of a row with images.

    Args:
        limit: number of tokens that it has positions for; None: any number.
    Raises:
        RowError: the instruction is too long; the message names the row.
    """
    if limit is None or processor.qformer_tokenizer is None:
        return
    read = len(processor.qformer_tokenizer(instruction)["input_ids"])
    if read > limit:
        message = (
            f"the instruction has {read} tokens, and the Q-Former reads {limit}. Shorten it, or take the row out."
        )
        raise row_error(name, "long", message)


def check_instructions(processor: Any, config: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Check that a Q-Former can read all instructions, before any row is answered.

    Args:
        config: the model's configuration; only the composite has a Q-Former that reads instructions.
    Raises:
        RowError: as in `check_instruction`.
    """
    limit = getattr(getattr(config, "qformer_config", None), "max_position_embeddings", None)
    if limit is None or getattr(processor, "qformer_tokenizer", None) is None:
        return
    for row in rows:
        if row["images"]:
            check_instruction(processor, row["id"], processor.instruction(row["messages"]), limit)
