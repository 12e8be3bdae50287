"""Rows of conversations -> the composite's inputs, with labels on the answers' tokens alone."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from ..backbone.positions import position_limit
from ..utils.shorten import cut, short
from .answer_spans import ANSWER, AnswerSpans, PromptRewritten, turn
from .images import Augmentation, open_image
from .instructions import check_instruction
from .rows import COUNTS, DRAW, DRAWN, Fault, RowError

IGNORE = -100
REMEDY = "Write another chat_template in the recipe."


class ConversationCollator:
    """Make batches for training a composite.

    Only what the assistant says counts in the loss, with the token that ends it; images, instructions and padding do
    not. `needs_split` says whether a row must hold one answer to learn, its last (see `split_turns`): for an
    encoder-decoder; for a Q-Former, which reads what is asked up to an answer and nothing later; and for a chat
    template that writes an answer in another way once more is said, or a prompt unlike generation's.

    Args:
        processor: the composite's.
        is_encoder_decoder: as in the composite's configuration.
        augmentation: of training images; None: as they are.
        max_length: tokens per row; longer ones are cut at the end, decoder-only models' alone. None: not at all.
        max_positions: tokens that the language model, or an encoder-decoder's encoder, takes; a row that is longer,
            once cut, is refused. None: any.
        max_target_length: tokens that an encoder-decoder's decoder takes; None: it has no limit.
        max_instruction_length: tokens that a Q-Former reads; None: it has no limit.
        system: a system message for conversations without one.
        seed: of the augmentation, which depends on it and on a row's "draw" alone (see `draws`), whatever was drawn
            before and by whichever worker.
    Raises:
        ValueError: the tokenizer cannot tell where tokens come from, or there is no chat template, or one that takes
            no question with its answer.
    """

    def __init__(
        self,
        processor: Any,
        *,
        is_encoder_decoder: bool = False,
        augmentation: Augmentation | None = None,
        max_length: int | None = None,
        max_positions: int | None = None,
        max_target_length: int | None = None,
        max_instruction_length: int | None = None,
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(processor.tokenizer).__name__} does not say which text its tokens come from, so answers "
                "cannot be told from questions. Load the fast tokenizer of this model."
            )
        if processor.chat_template is None:
            raise ValueError(
                "The language model has no chat template. Write chat_template: vicuna, plain or t5 in the recipe, or "
                "set processor.chat_template."
            )
        self.processor = processor
        self.is_encoder_decoder = is_encoder_decoder
        self.augmentation = augmentation
        self.max_length = max_length
        self.max_positions = max_positions
        self.max_target_length = max_target_length
        self.max_instruction_length = max_instruction_length
        self.system = system
        self.seed = seed
        self._before = self._turns_before_probes()
        self._writes_prompts_apart = self._has_prompts_of_its_own()
        self.needs_split = (
            is_encoder_decoder
            or processor.qformer_tokenizer is not None
            or self._writes_prompts_apart
            or not self._keeps_earlier_turns()
        )
        self._spans = AnswerSpans(self._render, processor.chat_template, self._before)

    @staticmethod
    def limits(config: Any) -> dict[str, Any]:
        """What a composite's configuration tells of its kind and of how much its parts read, as arguments."""
        text, decoder = config.text_config, position_limit(config.text_config, "decoder")
        return {
            "is_encoder_decoder": config.is_encoder_decoder,
            "max_positions": position_limit(text, "encoder") if config.is_encoder_decoder else decoder,
            "max_target_length": decoder if config.is_encoder_decoder else None,
            "max_instruction_length": getattr(config.qformer_config, "max_position_embeddings", None),
        }

    def _turns_before_probes(self) -> list[dict[str, Any]]:
        """A system message where one is given, or where the template demands one, which rows may have."""
        system = [turn("system", self.system if self.system is not None else "(system)")]
        turns = [turn("user", "(question)"), turn("assistant", ANSWER)]
        errors = []
        for before in ([], system) if self.system is None else (system, []):
            try:
                self._render([*before, *turns])
                self._render([*before, turns[0]], prompt=True)
            except TemplateError as error:
                errors.append(error)
            else:
                return before
        raise ValueError(
            f"chat_template: the language model's template does not take a question and its answer ({errors[0]}). "
            "Write chat_template: vicuna, plain or t5 in the recipe, or mend processor.chat_template."
        ) from errors[0]

    def _keeps_earlier_turns(self) -> bool:
        """Whether the template writes a conversation's beginning alike, whatever follows (Qwen 3's does not)."""
        said = [*self._before, *(turn(role, role) for role in ("user", "assistant") * 2)]
        try:
            return self._render(said).startswith(self._render(said[:-2]).rstrip())
        except TemplateError:  # it takes one question alone
            return False

    def _has_prompts_of_its_own(self) -> bool:
        """Whether a prompt for generation is no beginning of the conversation with its answer.

        Gemma 4's closes an empty thought before the answer, DeepSeek R1's opens one, and neither stands in what they
        write of a conversation. An answer is learned after the prompt that it will follow.
        """
        asked = [*self._before, turn("user", "(question)")]
        said = self._render([*asked, turn("assistant", ANSWER)])
        return ANSWER in said and not said.startswith(self._render(asked, prompt=True))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn rows of `read_rows` or `load_rows` into a batch.

        Returns:
            input_ids, attention_mask, labels, (rows, tokens), padded on the right; pixel_values where there are
            images, and what a Q-Former reads of the instructions.
        Raises:
            ValueError: an image cannot be read, an instruction is too long for the Q-Former, or as in `encode`; the
                message names the row.
        """
        if DRAWN in rows[0]:
            return {}  # of a stream that goes on: the Trainer throws these away
        encoded = [self.encode(row) for row in rows]
        for row, item in zip(rows, encoded, strict=True):
            if not row.get(COUNTS, True):
                item["labels"] = [IGNORE] * len(item["labels"])
        batch = {
            "input_ids": _pad([item["input_ids"] for item in encoded], self.processor.tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(item["input_ids"]) for item in encoded], 0),
            "labels": _pad([item["labels"] for item in encoded], IGNORE),
        }
        images = [image for row in rows for image in self._images(row)]
        if not images:
            return batch
        batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        reader = self.processor.qformer_tokenizer
        if reader is not None:
            instructions = [
                item["instruction"] for item, row in zip(encoded, rows, strict=True) for _ in row["images"]
            ]
            read = reader(instructions, padding=True, return_tensors="pt")
            batch |= {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")}
        return batch

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """One row's input_ids, labels and the instruction for a Q-Former; no image is opened.

        Returns:
            Also "length", the number of tokens before a cut.
        Raises:
            RowError: the last turn is no answer, a decoder cannot hold it, a Q-Former cannot read the instruction, a
                cut would leave no answer or part of an image, the text holds image tokens of its own, or the chat
                template hides where an answer begins or does not take the conversation.
        """
        name = row["id"]
        messages = list(row["messages"])
        if messages[-1]["role"] != "assistant":
            raise _error(name, "order", "the last turn is no answer. Take that turn out.")
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages]
        encode = self._encoder_decoder if self.is_encoder_decoder else self._decoder_only
        try:
            encoded = {**encode(messages, name), "instruction": self.processor.instruction(messages)}
        except TemplateError as error:  # Gemma's takes no system message, Mistral's no two turns of one role
            raise _error(
                name,
                "template",
                f"the language model's chat template says: {cut(str(error), 300)}. Change the row (or system: in the "
                "recipe), or write another chat_template in the recipe.",
            ) from error
        tokens = encoded["input_ids"].count(self.processor.image_token_id)
        if tokens != len(row["images"]) * self.processor.image_seq_length:
            raise _error(
                name,
                "placeholder",
                f"{tokens} image tokens for {len(row['images'])} images of {self.processor.image_seq_length}. Take "
                f"{self.processor.image_token!r} out of the text.",
            )
        if self.max_positions is not None and len(encoded["input_ids"]) > self.max_positions:
            raise _error(
                name,
                "long",
                f"{len(encoded['input_ids'])} tokens, {tokens} of them image tokens, and the language model takes "
                f"{self.max_positions}. "
                + (
                    "Shorten the row"
                    if self.is_encoder_decoder
                    else f"Write max_length: {self.max_positions} to cut it"
                )
                + ", or take it out.",
            )
        if row["images"]:
            check_instruction(self.processor, name, encoded["instruction"], self.max_instruction_length)
        return encoded

    def _decoder_only(self, messages: list[dict[str, Any]], name: str) -> dict[str, Any]:
        if self._writes_prompts_apart:
            prompt = self._render(messages[:-1], prompt=True)
            text = prompt + self._answer(messages, name)
            return self._with_labels(text, [(len(prompt), len(text))], name)
        text = self._render(messages)
        try:
            spans = self._spans.find(messages, text, earlier=not self.needs_split)
        except PromptRewritten as error:
            raise _error(
                name,
                "answer",
                f"the chat template writes the prompt {error.prompt[-40:]!r} in another way once the answer follows, "
                f"so what is to be learned cannot be told. {REMEDY}",
            ) from error
        return self._with_labels(text, spans, name)

    def _answer(self, messages: list[dict[str, Any]], name: str) -> str:
        """The last answer as the template writes it, with what ends it."""
        before, _, ending = self._render([*messages[:-1], turn("assistant", ANSWER)]).rpartition(ANSWER)
        said = self._render(messages)
        if not (said.startswith(before) and said.endswith(ending)):
            raise _error(
                name, "answer", "the chat template writes what comes before an answer by its words. " + REMEDY
            )
        return said[len(before) :].rstrip()

    def _with_labels(self, text: str, spans: list[tuple[int, int]], name: str) -> dict[str, Any]:
        """Tokens, and labels where a token is part of what stands between a span's first and last character."""
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        starts, stops = ([*edges] for edges in zip(*spans, strict=True))
        labels = []
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True):
            # A token may hold the space before an answer too; one that ends before it is none of it.
            span = bisect_right(stops, first)
            labels.append(token if span < len(starts) and starts[span] < last else IGNORE)
        if all(label == IGNORE for label in labels):
            raise _error(
                name, "answer", "no token is learned; the answer is empty, or the chat template leaves it out."
            )
        length = len(ids)
        if self.max_length is not None and length > self.max_length:
            ids, labels = self._cut(ids, labels, name)
        return {"input_ids": ids, "labels": labels, "length": length}

    def _cut(self, ids: list[int], labels: list[int], name: str) -> tuple[list[int], list[int]]:
        image = self.processor.image_token_id
        kept = ids[: self.max_length]
        if kept.count(image) != ids.count(image) or all(label == IGNORE for label in labels[: self.max_length]):
            raise _error(
                name,
                "long",
                f"{len(ids)} tokens, {ids.count(image)} of them image tokens; the first {self.max_length} hold no "
                "whole image and answer. Raise max_length, or take the row out.",
            )
        return kept, labels[: self.max_length]

    def _encoder_decoder(self, messages: list[dict[str, Any]], name: str) -> dict[str, list[int]]:
        tokenizer = self.processor.tokenizer
        prompt = self._render(messages[:-1], prompt=True)
        target = tokenizer(text_target="".join(part["text"] for part in messages[-1]["content"]))["input_ids"]
        if self.max_target_length is not None and len(target) > self.max_target_length:
            raise _error(
                name,
                "long",
                f"the answer has {len(target)} tokens, and the decoder takes {self.max_target_length}. Shorten the "
                "answer, or take the row out.",
            )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "labels": target, "length": len(ids)}

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        if not messages:
            return ""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        return text.replace(self.processor.image_token, self.processor.image_token * self.processor.image_seq_length)

    def _images(self, row: dict[str, Any]) -> Iterator[Image.Image]:
        chance = random.Random(f"{self.seed} {row[DRAW]}") if DRAW in row else None
        for path in row["images"]:
            opened = open_image(path, f"Row {short(row['id'])}")
            yield self.augmentation(opened, chance) if self.augmentation is not None else opened


def _error(name: str, kind: str, message: str) -> RowError:
    return RowError(f"Row {short(name)}", [Fault(kind, message)])


def _first_turns(row: dict[str, Any], count: int) -> dict[str, Any]:
    messages = row["messages"][:count]
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {"id": row["id"], "images": row["images"][:shown], "messages": messages}


def split_turns(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per answer, with all that was said before it: what an encoder-decoder learns from.

    Images stay with the turns that show them.
    """
    for row in rows:
        for end, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                yield _first_turns(row, end + 1)


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
