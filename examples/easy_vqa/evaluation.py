"""Answer questions by free generation, and score the answers by kind of question."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from peft import PeftModel
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
    """Generate one greedy answer per question. An image is read once for all its questions in a batch.

    Args:
        features: (images, tokens, vision_width) by image_id; a single row answers every question blindly.
    """
    model.eval()
    composite = model.get_base_model() if isinstance(model, PeftModel) else model
    tokenizer, image_token = processor.tokenizer, processor.image_token
    images = [row["image_id"] if len(features) > 1 else 0 for row in questions]
    order = sorted(range(len(questions)), key=lambda i: images[i])
    answers = [""] * len(questions)
    # The number 1, generate's default, would slice a view, and PyTorch would copy the head's weight for each row.
    last_token = torch.tensor([-1], device=model.device)
    for first in track(range(0, len(order), batch_size), description=description):
        chosen = order[first : first + batch_size]
        chats = [data.messages([[questions[i]["question"]]]) for i in chosen]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        system, _, _ = prompts[0].partition(image_token)
        seen = sorted({images[i] for i in chosen})
        prefix = tokenizer(
            [system + image_token * processor.image_seq_length] * len(seen),
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        asked = tokenizer(
            [prompt.partition(image_token)[2] for prompt in prompts],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        read = model(
            **prefix, vision_features=features[seen].to(model.device), use_cache=True, logits_to_keep=last_token
        )
        row_of = {image: row for row, image in enumerate(seen)}
        rows = torch.tensor([row_of[images[i]] for i in chosen], device=model.device)
        read.past_key_values.batch_select_indices(rows)
        cached = torch.ones_like(prefix["input_ids"][rows])  # any ids: their keys and values are cached
        input_ids = torch.cat([cached, asked["input_ids"]], dim=1)
        output = composite.language_model.generate(
            input_ids=input_ids,
            attention_mask=torch.cat([cached, asked["attention_mask"]], dim=1),
            past_key_values=read.past_key_values,
            logits_to_keep=last_token,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip().lower().rstrip(".")
    return answers


def score(questions: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, float]]:
    """Compute exact match by kind: kind -> accuracy, standard error, n."""
    return accuracies(data.KINDS, [row["kind"] for row in questions], questions, answers)


def score_yes_no(questions: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, float]]:
    """Compute exact match of the yes/no questions by wording and truth. Answering by the wording alone is right if the
    image does not show the object, and wrong if it does."""
    groups = [data.yes_no_group(row) for row in questions]
    return accuracies(data.YES_NO_GROUPS, groups, questions, answers)


def accuracies(
    names: tuple[str, ...], groups: list[str | None], questions: list[dict[str, Any]], answers: list[str]
) -> dict[str, dict[str, float]]:
    """Compute exact match per group of questions: name -> accuracy, standard error, n; empty groups are left out."""
    result = {}
    for name in names:
        rows = zip(groups, questions, answers, strict=True)
        hits = [said == row["answer"] for group, row, said in rows if group == name]
        if hits:
            accuracy = sum(hits) / len(hits)
            stderr = math.sqrt(accuracy * (1 - accuracy) / len(hits))
            result[name] = {"accuracy": accuracy, "stderr": stderr, "n": len(hits)}
    return result


def spread(scores: list[dict[str, Any]], name: str) -> str:
    """Format a group's accuracy for a table: the mean over seeds with the lowest and the highest, or for one seed its
    standard error.

    Args:
        scores: results of `accuracies`, one per seed.
        name: the group.
    """
    values = [score[name]["accuracy"] for score in scores]
    if len(values) == 1:
        return f"{values[0]:.1%} ± {scores[0][name]['stderr']:.1%}"
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
