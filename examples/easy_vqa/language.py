"""Measure what the language model keeps: its loss on English prose, and a known fact, asked without an image."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from peft_crome.evaluation import adapters_off, text_loss

from .parts import english_text

QUESTION = "What is the capital of France?"
MAX_NEW_TOKENS = 20


def language_kept(model: Any, processor: Any, text: str | None = None) -> dict[str, Any]:
    """Measure a model on text alone, with its adapter and without it. It takes about three minutes on two cores.

    Args:
        model: a composite, adapted or not.
        processor: the composite's processor.
        text: plain text; None: the result of `english_text`.
    Returns:
        text_loss (the fields of `peft_crome.evaluation.TextLoss`, nats a token), question, answer (with the adapter),
        base_answer (without it) and seconds.
    """
    start = time.perf_counter()
    # One chunk at a time is 15% faster than four, whose logits take 400 MB.
    loss = text_loss(model, processor.tokenizer, text or english_text(), batch_size=1)
    answer = answer_without_image(model, processor)
    with adapters_off(model):
        base_answer = answer_without_image(model, processor)
    return {
        "text_loss": asdict(loss),
        "question": QUESTION,
        "answer": answer,
        "base_answer": base_answer,
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.inference_mode()
def answer_without_image(model: Any, processor: Any, question: str = QUESTION) -> str:
    """Answer a text question greedily, under the model's chat template."""
    model.eval()
    tokenizer = processor.tokenizer
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def columns(kept: list[dict[str, Any]]) -> list[str]:
    """Format a table's cells for one method: the loss with the adapter, its cost, the loss without, and the answers.

    Args:
        kept: results of `language_kept` by seed; empty if nothing was measured.
    """
    if not kept:
        return ["-", "-", "-"]
    losses = [one["text_loss"] for one in kept]
    costs = [loss["cost"] for loss in losses]
    cost = f"+{costs[0]:.3f} ± {losses[0]['cost_stderr']:.3f}" if len(kept) == 1 else _range(costs)
    adapted = statistics.mean(loss["adapted"] for loss in losses)
    answers = dict.fromkeys(one["answer"] for one in kept)
    return [
        f"{adapted:.3f} ({cost})",
        f"{statistics.mean(loss['base'] for loss in losses):.3f}",
        ", ".join(f'"{answer}"' for answer in answers),
    ]


def base_columns(kept: list[dict[str, Any]]) -> list[str]:
    """Format the same cells for a projection alone, which attaches nothing to the language model.

    Args:
        kept: results of `language_kept` for any method; the values without the adapter are shown.
    """
    if not kept:
        return ["-", "-", "-"]
    base = f"{kept[0]['text_loss']['base']:.3f}"
    return [f"{base} (nothing attached)", base, f'"{kept[0]["base_answer"]}"']


def _range(costs: list[float]) -> str:
    return f"+{min(costs):.3f} to +{max(costs):.3f}"
