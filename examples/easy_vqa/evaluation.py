"""Answer questions by free generation, and score the answers by kind of question."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.progress import track

from . import data

MAX_NEW_TOKENS = 5  # the longest of the 13 answers is two tokens and the end of the turn


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    features: torch.Tensor,
    questions: list[dict[str, Any]],
    batch_size: int = 64,
    description: str = "answering",
) -> list[str]:
    """Greedy free generation, one answer per question.

    Args:
        features: (pictures, tokens, vision_width) by image_id; one row answers every question blindly.
    """
    model.eval()
    prompts = [
        processor.apply_chat_template(
            data.messages([[row["question"]]]), add_generation_prompt=True, tokenize=False
        ).replace(processor.image_token, processor.image_token * processor.image_seq_length)
        for row in questions
    ]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    answers = [""] * len(questions)
    for first in track(range(0, len(order), batch_size), description=description):
        chosen = order[first : first + batch_size]
        inputs = processor.tokenizer(
            [prompts[i] for i in chosen],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        pictures = [questions[i]["image_id"] if len(features) > 1 else 0 for i in chosen]
        output = model.generate(
            **inputs,
            vision_features=features[pictures].to(model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip().lower().rstrip(".")
    return answers


def score(questions: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, float]]:
    """Exact match by kind: kind -> accuracy, standard error, n."""
    result = {}
    for kind in data.KINDS:
        hits = [a == row["answer"] for row, a in zip(questions, answers, strict=True) if row["kind"] == kind]
        if hits:
            accuracy = sum(hits) / len(hits)
            stderr = math.sqrt(accuracy * (1 - accuracy) / len(hits))
            result[kind] = {"accuracy": accuracy, "stderr": stderr, "n": len(hits)}
    return result
