"""Answer conversations by free generation; `metrics` scores the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from ..data import open_image
from ..data.instructions import check_instructions
from ..utils.shorten import short

# Of a language model's generation configuration, what makes another answer of the likeliest tokens, turned off: BART's
# has beams and a least length, chat models' a penalty. Tokens that a model is made to begin with, or never to say,
# belong to it and stay.
GREEDY = {
    "do_sample": False, "num_beams": 1, "early_stopping": False, "num_return_sequences": 1, "min_length": 0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
}  # fmt: skip


@torch.no_grad()  # not inference_mode: what a layer keeps is trained with afterwards
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
    """Answer the last question of each row, greedily, whatever the model's generation configuration says.

    Args:
        model: a composite, adapted or not.
        processor: the composite's.
        rows: of `read_rows` or `load_rows`; the last turn is the reference, which the model does not see.
        batch_size: rows at a time.
        max_new_tokens: of an answer.
        system: a system message for conversations without one.
        progress: show a bar.
    Returns:
        One text per row, in their order. The model is left in the mode it was in, module by module.
    Raises:
        RowError: an instruction is longer than the Q-Former reads; no row is answered then.
        ValueError: an image cannot be read; the message names the row.
    """
    composite = model.get_base_model() if isinstance(model, PeftModel) else model
    check_instructions(processor, composite.config, rows)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return _generate(model, processor, rows, batch_size, max_new_tokens, system, progress)
    finally:
        for module in training:
            module.training = True


def _generate(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    max_new_tokens: int,
    system: str | None,
    progress: bool,
) -> list[str]:
    composite = model.get_base_model() if isinstance(model, PeftModel) else model
    greedy: dict[str, Any] = {**GREEDY}
    if getattr(composite.generation_config, "min_new_tokens", None):
        greedy["min_new_tokens"] = 0  # not otherwise: transformers warns of it beside min_length
    answers: list[str] = []
    for first in tqdm(range(0, len(rows), batch_size), desc="answering", leave=False, disable=not progress):
        chosen = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        prompts, images = [], []
        for row in chosen:
            messages = list(row["messages"])
            if messages[-1]["role"] == "assistant":
                messages.pop()
            if system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
            prompts.append(messages)
            images.append([open_image(path, f"Row {short(row['id'])}") for path in row["images"]])
        given = {"images": images} if any(images) else {}
        batch = processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **given},
        ).to(composite.device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, **greedy)
        read = 0 if composite.config.is_encoder_decoder else batch["input_ids"].shape[1]
        texts = processor.tokenizer.batch_decode(output[:, read:], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers
