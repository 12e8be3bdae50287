"""Run a model's processor on a conversation, and find the text that each of its tokens comes from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .answer_spans import Messages

# The first message carries the rendered text, which the template then prints.
RENDERED = "crome_rendered"
AS_RENDERED = f"{{{{- messages[0]['{RENDERED}'] -}}}}"

MANY = 64  # more words than a token of repeated words can contain


class UnknownPlaceholder(ValueError):
    """A processor's text cannot be separated from the tokens of its images, videos and sounds."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one conversation.

    Attributes:
        text: the tokenizer's input, with each placeholder expanded to all of its tokens.
        ids: without padding.
        offsets: the first character of each token in `text`, and the one after its last.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class _Recording:
    """Mix-in of fast tokenizers that records each call, with the text and the offsets of the tokens."""

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(text, *args, **kwargs)  # type: ignore[misc]
        if text is None:  # only the text of a target
            return made
        for one, encoding in zip([text] if isinstance(text, str) else text, made.encodings, strict=True):
            kept = [number for number, real in enumerate(encoding.attention_mask) if real]
            ids, offsets = encoding.ids, encoding.offsets  # each is a new list
            self.calls.append(  # type: ignore[attr-defined]
                Tokens(one, [ids[number] for number in kept], [offsets[number] for number in kept])
            )
        self.settings.update(kwargs)  # type: ignore[attr-defined]
        return made


def recording(tokenizer: Any) -> Any:
    """Copy a fast tokenizer so that it records its calls in `calls`."""
    made = copy.copy(tokenizer)
    made.__class__ = type(type(tokenizer).__name__, (_Recording, type(tokenizer)), {})
    made.calls, made.settings = [], {}
    return made


class Processed:
    """Run a processor on rendered conversations, and trace characters to tokens.

    Args:
        processor: processor with a fast tokenizer; it is not changed.
    """

    def __init__(self, processor: Any) -> None:
        self._unwatched = processor.tokenizer
        self.added_tokens = tuple(processor.tokenizer.get_added_vocab())
        self.stands_alone = cache(self._stands_alone)
        self.processor = copy.copy(processor)
        self.processor.tokenizer = self._tokenizer = recording(processor.tokenizer)

    def batch(self, conversations: Sequence[Messages], texts: Sequence[str]) -> tuple[Any, list[Tokens]]:
        """Make a padded batch, and return the tokens of each conversation.

        Args:
            conversations: conversations with media from `MediaReader.read`; all of them have some, or none has.
            texts: the conversations as rendered by the chat template.
        Returns:
            The result of `processor.apply_chat_template(..., tokenize=True, return_dict=True)`, padded on the right.
        Raises:
            UnknownPlaceholder: the processor's tokens differ from its tokenizer's.
        """
        self._tokenizer.calls.clear()
        shown = [
            [{**messages[0], RENDERED: text}, *messages[1:]]
            for messages, text in zip(conversations, texts, strict=True)
        ]
        made = self.processor.apply_chat_template(
            shown,
            chat_template=AS_RENDERED,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right", **video_arguments(conversations)},
        )
        by_ids: dict[tuple[int, ...], list[Tokens]] = {}
        for tokens in self._tokenizer.calls:
            by_ids.setdefault(tuple(tokens.ids), []).append(tokens)
        row_tokens = []
        for ids, mask in zip(made["input_ids"].tolist(), made["attention_mask"].tolist(), strict=True):
            row = tuple(token for token, real in zip(ids, mask, strict=True) if real)
            if not by_ids.get(row):
                raise UnknownPlaceholder(
                    f"{type(self.processor).__name__} changes the tokens that its tokenizer returns, so the tokens of "
                    "an answer cannot be found."
                )
            row_tokens.append(by_ids[row].pop(0))
        return made, row_tokens

    def tokens(self, text: str) -> Tokens:
        """Tokenize an expanded text, with or without special tokens as in the processor's last call."""
        (encoding,) = self.encodings([text])
        return Tokens(text, encoding.ids, encoding.offsets)

    def encodings(self, texts: Sequence[str]) -> Sequence[Any]:
        """Return the `tokenizers.Encoding` of each of many texts, tokenized as in `tokens`."""
        if not texts:
            return []
        asked = self._tokenizer.settings.get("add_special_tokens", True)
        made = self._unwatched(
            list(texts), add_special_tokens=asked, return_attention_mask=False, return_token_type_ids=False
        )
        return made.encodings  # type: ignore[no-any-return]

    def _stands_alone(self, token: str) -> bool:
        """Whether an added token stays the same token beside itself, so that a run need not be tokenized."""
        ids = self._unwatched(token * MANY, add_special_tokens=False)["input_ids"]
        return list(ids) == [self._unwatched.convert_tokens_to_ids(token)] * MANY


def with_template(processor: Any) -> Any:
    """Return the processor, or a copy with its tokenizer's chat template: Phi-4's processor has none."""
    template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if processor.chat_template is not None or template is None:
        return processor
    processor = copy.copy(processor)
    processor.chat_template = template
    return processor


def video_arguments(conversations: Sequence[Messages]) -> dict[str, Any]:
    """Build a processor's arguments for videos whose frames are chosen already; empty without videos."""
    metadata = [
        part["metadata"]
        for messages in conversations
        for message in messages
        for part in message["content"]
        if "metadata" in part
    ]
    return {"video_metadata": metadata, "do_sample_frames": False} if metadata else {}


def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Join tensors of (tokens, ...) to one of (rows, tokens, ...), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
