"""Answer conversations by free generation, and score the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from ..data import open_image


@torch.inference_mode()
def generate_answers(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    system: str | None = None,
    progress: bool = True,
) -> list[str]:
    """Answer the last question of each row, greedily.

    Args:
        model: a composite, adapted or not.
        processor: the composite's.
        rows: of `read_rows` or `load_rows`; the last turn is the reference, which the model does not see.
        batch_size: rows at a time.
        max_new_tokens: of an answer.
        system: a system message for conversations without one.
        progress: show a bar.
    Returns:
        One text per row, in their order.
    """
    was_training = model.training
    model.eval()
    composite = model.get_base_model() if isinstance(model, PeftModel) else model
    answers: list[str] = []
    for first in tqdm(range(0, len(rows), batch_size), desc="answering", disable=not progress):
        chosen = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        prompts, pictures = [], []
        for row in chosen:
            messages = list(row["messages"])
            if messages[-1]["role"] == "assistant":
                messages.pop()
            if system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
            prompts.append(messages)
            pictures.append([open_image(path, f"Row {row['id']!r}") for path in row["images"]])
        given = {"images": pictures} if any(pictures) else {}
        batch = processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **given},
        ).to(composite.device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        read = 0 if composite.config.is_encoder_decoder else batch["input_ids"].shape[1]
        texts = processor.tokenizer.batch_decode(output[:, read:], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    model.train(was_training)
    return answers


def references(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The text of each row's last turn.

    Raises:
        ValueError: a row's last turn is no answer.
    """
    unanswered = [row["id"] for row in rows if row["messages"][-1]["role"] != "assistant"]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} rows end without an answer to compare with, the first is {unanswered[0]!r}. Take them "
            "out."
        )
    return ["".join(part["text"] for part in row["messages"][-1]["content"]).strip() for row in rows]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Share of answers that are the expected ones, but for case and a final full stop.

    Returns:
        accuracy, its standard error, n.

    Example:
        >>> exact_match(["Red.", "two"], ["red", "three"])
        {'accuracy': 0.5, 'stderr': 0.3536, 'n': 2}
    """
    if not expected:
        return {"accuracy": math.nan, "stderr": math.nan, "n": 0}
    pairs = zip(answers, expected, strict=True)
    hits = [said.strip().lower().rstrip(".") == wanted.strip().lower().rstrip(".") for said, wanted in pairs]
    accuracy = sum(hits) / len(hits)
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(hits))
    return {"accuracy": round(accuracy, 4), "stderr": round(stderr, 4), "n": len(hits)}
