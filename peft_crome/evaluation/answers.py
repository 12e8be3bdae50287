"""Answer conversations by free generation; `metrics` scores the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..backbone.model import unwrapped
from ..backbone.modes import evaluating
from ..data.instructions import check_instructions
from ..data.media import media_of, with_media
from ..data.media_reader import MediaReader
from ..data.processed import video_arguments, with_template
from ..data.taken import check_rows, naming_batch

# Settings of a generation configuration that lead away from the likeliest tokens are turned off: BART has beams and
# a least length, chat models a penalty. Tokens that a model must begin with, or must never write, belong to it and
# stay.
GREEDY = {
    "do_sample": False, "num_beams": 1, "early_stopping": False, "num_return_sequences": 1, "min_length": 0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
}  # fmt: skip


@torch.no_grad()  # not inference_mode, since training may use what a layer keeps
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
    """Answer the last question of each row greedily, independent of the model's generation configuration.

    Args:
        model: a composite or any other model whose processor has a chat template, adapted or not.
        processor: the model's processor.
        rows: rows of `read_rows` or `load_rows`. The last turn is the reference, which the model does not see.
        batch_size: number of rows in a batch.
        max_new_tokens: largest number of tokens in an answer.
        system: a system message for conversations that have none.
        progress: whether to show a progress bar.
    Returns:
        One text per row, in the order of the rows. Each module of the model stays in its mode.
    Raises:
        RowError: an instruction is longer than the Q-Former reads, or the model takes no video or no sound. Then no
            row is answered.
        ValueError: an image, a video or a sound cannot be read. The message names the row.
        ImportError: a package that reads videos or sound is missing.
    """
    host = unwrapped(model)
    processor = with_template(processor)
    check_instructions(processor, host.config, rows)
    check_rows(rows, processor)
    is_encoder_decoder = host.config.is_encoder_decoder
    greedy: dict[str, Any] = {**GREEDY}
    if getattr(host.generation_config, "min_new_tokens", None):
        greedy["min_new_tokens"] = 0  # set only here: transformers warns about it beside min_length
    if host.device.type == "cpu" and host._supports_logits_to_keep():
        # `generate` passes the number 1, which slices a view. PyTorch then copies the head's weight for each row.
        greedy["logits_to_keep"] = torch.tensor([-1])
    padding = {"padding": True, "padding_side": "right" if is_encoder_decoder else "left"}
    reader = MediaReader(processor)
    answers: dict[int, str] = {}
    with evaluating(model):
        for first in tqdm(range(0, len(rows), batch_size), desc="answering", leave=False, disable=not progress):
            for group in _groups(rows, range(first, min(first + batch_size, len(rows)))):
                prompts = [_prompt(rows[n], reader, system) for n in group]
                with naming_batch([rows[n] for n in group], processor, "Answer one row at a time (batch_size 1)"):
                    batch = processor.apply_chat_template(
                        prompts,
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=True,
                        return_tensors="pt",
                        processor_kwargs={**padding, **video_arguments(prompts)},
                    )
                batch = batch.to(host.device, dtype=host.dtype)
                output = model.generate(**batch, max_new_tokens=max_new_tokens, **greedy)
                read = 0 if is_encoder_decoder else batch["input_ids"].shape[1]
                texts = processor.tokenizer.batch_decode(output[:, read:], skip_special_tokens=True)
                answers |= {n: text.strip() for n, text in zip(group, texts, strict=True)}
    return [answers[n] for n in range(len(rows))]


def _groups(rows: Sequence[dict[str, Any]], chosen: Sequence[int]) -> Iterator[list[int]]:
    """Yield rows to answer together, since not every processor takes all media in one batch."""
    kinds = [tuple(media_of(rows[n])) for n in chosen]
    for kind in dict.fromkeys(kinds):
        yield [n for n, other in zip(chosen, kinds, strict=True) if other == kind]


def _prompt(row: dict[str, Any], reader: MediaReader, system: str | None) -> list[dict[str, Any]]:
    """Return the question of a row, with its images, videos and sounds."""
    messages = list(row["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    return with_media(messages, reader.read(row))
