"""Turn conversations into a model's inputs, with labels only on the answers' tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jinja2 import TemplateError

from ..backbone.labeled import IGNORED
from ..backbone.positions import position_limit
from ..utils.shorten import short
from .answer_spans import Messages, Span
from .chat_template import ChatTemplate, refused
from .expansion import PROBES, Expansion, Run, shortened, tokens_in, written_out
from .images import Augmentation
from .instructions import check_instruction
from .media import kinds_of, media_of, with_media
from .media_reader import Header, MediaReader
from .processed import Processed, Tokens, UnknownPlaceholder, padded
from .row_text import Draft, RowSize, RowText, or_error
from .rows import COUNTS, DRAW, DRAWN, row_error
from .taken import check_batch, check_row, naming_batch

ORDINARY: Header = ("image", (640, 480))  # if no size is known


@dataclass(eq=False, repr=False)
class ConversationCollator:
    """Make batches of conversations for training any model whose processor has a chat template.

    A batch is the result of `processor.apply_chat_template(conversation, tokenize=True, return_dict=True)`, padded on
    the right. The processor chooses the frames of a video file, and sound is read at its sampling rate. Only the
    assistant's words count in the loss, with the token that ends them. Images, videos, sounds, instructions and
    padding do not count.

    `needs_split` is true if a row must have one answer to learn, its last (see `split_turns`). This holds for an
    encoder-decoder, and for a Q-Former, which reads the question of one answer. It also holds for a chat template that
    writes an answer in another way once more turns follow, or a prompt unlike the one for generation.

    Args:
        processor: the model's processor, with a fast tokenizer.
        is_encoder_decoder: the same value as in the model's configuration.
        augmentation: how training images are cropped and mirrored. None leaves them unchanged.
        max_length: number of tokens at which a row of a decoder-only model is cut. None cuts nothing.
        max_positions: number of tokens that the language model, or the encoder of an encoder-decoder, takes. A longer
            row raises an error, after the cut. None means no limit.
        max_target_length: number of tokens that the decoder of an encoder-decoder takes. None means no limit.
        max_instruction_length: number of tokens that a Q-Former reads. None means no limit.
        system: a system message for conversations that have none.
        ends_answers: put the tokenizer's end token after answers if the chat template writes none, as in LLaVA 1.5,
            so that the model learns to stop.
        seed: seed of the augmentation. An image's crop depends only on the seed and the row's "draw" (see
            `draws`), and not on the worker that makes it.
    Raises:
        ValueError: the processor is a bare tokenizer or has no fast one, has no chat template, or has one that rejects
            a question with its answer. Or its text cannot be separated from its images.
    """

    processor: Any
    _: KW_ONLY
    is_encoder_decoder: bool = False
    augmentation: Augmentation | None = None
    max_length: int | None = None
    max_positions: int | None = None
    max_target_length: int | None = None
    max_instruction_length: int | None = None
    system: str | None = None
    ends_answers: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.template = ChatTemplate(self.processor, self.system, self.ends_answers and not self.is_encoder_decoder)
        self.processor = self.template.processor
        self.needs_split = (
            self.is_encoder_decoder
            or getattr(self.processor, "qformer_tokenizer", None) is not None
            or self.template.writes_prompts_apart
            or not self.template.keeps_earlier_turns
        )

    @cached_property
    def _processed(self) -> Processed:
        return Processed(self.processor)

    @cached_property
    def _expansion(self) -> Expansion:
        return Expansion(self._processed, self.template.render, self.template.before, self._reader)

    @cached_property
    def _reader(self) -> MediaReader:
        return MediaReader(self.processor)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the recording tokenizer, whose class is made when needed, so that spawned workers can unpickle."""
        made = ("_processed", "_expansion", "_reader")
        return {name: value for name, value in vars(self).items() if name not in made}

    @staticmethod
    def limits(config: Any) -> dict[str, Any]:
        """Read the arguments from a model's configuration: its kind, and how many tokens its parts read."""
        text = config.get_text_config()
        is_encoder_decoder = bool(config.is_encoder_decoder)
        decoder = position_limit(text, "decoder")
        return {
            "is_encoder_decoder": is_encoder_decoder,
            "max_positions": position_limit(text, "encoder") if is_encoder_decoder else decoder,
            "max_target_length": decoder if is_encoder_decoder else None,
            "max_instruction_length": getattr(
                getattr(config, "qformer_config", None), "max_position_embeddings", None
            ),
        }

    @cached_property
    def image_tokens(self) -> int:
        """Number of tokens of an image of an ordinary size."""
        image, left_out = shortened(self._expansion.expand(["", ""], [0], [ORDINARY]))
        shown, alone = self._processed.encodings([image, ""])
        return len(shown) + left_out - len(alone)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn rows of `read_rows` or `load_rows` into a batch.

        Returns:
            input_ids, attention_mask, labels, (rows, tokens), padded on the right; with images, videos or sounds also
            the processor's other outputs, such as pixel_values.
        Raises:
            ValueError: an image, a video or a sound cannot be read, an instruction is too long for the Q-Former, or
                as in `encode`; the message names the row.
            ImportError: a package that reads videos or sound is missing.
        """
        if DRAWN in rows[0]:
            return {}  # rows that a resumed stream skips; the Trainer discards the batch
        read = [self._read(row) for row in rows]
        check_batch(rows, self.processor)
        groups = [[n for n, row in enumerate(rows) if bool(media_of(row)) is shown] for shown in (True, False)]
        parts = [self._batch([rows[n] for n in group], [read[n] for n in group]) for group in groups if group]
        batch = parts[0] if len(parts) == 1 else _merge(parts, groups, self.processor.tokenizer.pad_token_id or 0)
        for number, row in enumerate(rows):
            if not row.get(COUNTS, True):
                batch["labels"][number] = IGNORED
        return batch

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return one row's input_ids, labels and instruction for a Q-Former. Only headers of its files are read.

        Returns:
            The row, with "length", the number of tokens before a cut.
        Raises:
            RowError: the last turn is not an answer, a decoder cannot hold it, the instruction is too long, a
                cut would leave no answer or part of an image, the text contains image tokens, the model takes no such
                media, or the chat template hides where an answer begins or rejects the conversation.
            ValueError: a file's header cannot be read; the message names the row.
            ImportError: a package that reads videos or sound is missing.
        """
        read = self._read(row)
        tokens = self._processed.tokens(written_out(self._expanded(read, row)))
        labels = self._labels(tokens, read, row)
        kept = slice(None) if self.is_encoder_decoder else slice(self.max_length)
        return {
            "input_ids": tokens.ids[kept],
            "labels": labels if self.is_encoder_decoder else labels[kept],
            "length": len(tokens.ids),
            "instruction": read.instruction,
        }

    def measure(self, rows: Sequence[dict[str, Any]]) -> list[RowSize | ValueError]:
        """Count the tokens of rows as `encode` does, many at once and several times as fast.

        Returns:
            The size of each row, or the error that `encode` raises.
        Raises:
            ImportError: a package that reads videos or sound is missing.
        """
        sizes: list[RowSize | ValueError] = []
        limits = (None if self.is_encoder_decoder else self.max_length, self.max_positions)
        shortest_limit = min((limit for limit in limits if limit is not None), default=math.inf)
        drafts = [or_error(self._draft, row) for row in rows]
        texts = [draft.text for draft in drafts if not isinstance(draft, ValueError)]
        encodings = iter(self._processed.encodings(texts))
        for row, draft in zip(rows, drafts, strict=True):
            if isinstance(draft, ValueError):
                sizes.append(draft)
                continue
            encoding = next(encodings)
            length = len(encoding) + draft.left_out
            if draft.is_learned(encoding) and length <= shortest_limit:
                sizes.append(RowSize(length, length))
            else:
                sizes.append(or_error(self._size, row))
        return sizes

    def _size(self, row: dict[str, Any]) -> RowSize:
        encoded = self.encode(row)
        return RowSize(encoded["length"], len(encoded["input_ids"]))

    def _draft(self, row: dict[str, Any]) -> Draft:
        read = self._read(row)
        text, left_out = shortened(self._expanded(read, row))
        try:
            spans, _ = self._expansion.spans(read.spans, read.pieces, read.text, text)
        except UnknownPlaceholder:  # `encode` names the row
            spans = []
        return Draft(read, text, left_out, spans)

    def _expanded(self, read: RowText, row: dict[str, Any]) -> list[Run]:
        return self._expansion.expand(read.pieces, read.order, self._headers(row))

    def _read(self, row: dict[str, Any]) -> RowText:
        """Render a row with the chat template. No file is opened."""
        name = row["id"]
        if row["messages"][-1]["role"] != "assistant":
            raise row_error(name, "order", "the last turn is not an answer. Take that turn out.")
        check_row(row, self.processor)
        messages = self.template.completed(row["messages"])
        spans: list[Span] = []
        try:
            if self.is_encoder_decoder:
                text = self.template.render(messages[:-1], True)
            else:
                text, spans = self.template.with_answers(messages, name, earlier=not self.needs_split)
        except TemplateError as error:
            raise refused(name, error) from error
        try:
            pieces, order = self._expansion.pieces(text, kinds_of(messages))
        except UnknownPlaceholder as error:
            raise row_error(name, "placeholder", str(error)) from error
        for kind in self._expansion.kinds:
            token = getattr(self.processor, f"{kind}_token", None)
            if token and any(token in piece for piece in pieces):
                raise row_error(name, "placeholder", f"{token!r} in the text. Take {token!r} out of the text.")
        instruction = getattr(self.processor, "instruction", None)
        instruction_text = instruction(messages) if instruction is not None else ""
        if media_of(row) and instruction is not None:
            check_instruction(self.processor, name, instruction_text, self.max_instruction_length)
        target = self._target(messages, name) if self.is_encoder_decoder else None
        return RowText(messages, text, pieces, order, spans, target, instruction_text)

    def _headers(self, row: dict[str, Any]) -> list[Header]:
        """Return what the number of tokens of each medium depends on, in the order of the row's parts."""
        media = {kind: iter(values) for kind, values in media_of(row).items()}
        name = f"Row {short(row['id'])}"
        return [
            PROBES[0]
            if kind == "image" and self._expansion.is_fixed
            else self._reader.header(kind, next(media[kind]), name)
            for kind in kinds_of(row["messages"])
        ]

    def _target(self, messages: Messages, name: str) -> list[int]:
        """Return the tokens that a decoder learns."""
        answer = "".join(part["text"] for part in messages[-1]["content"])
        target: list[int] = self.processor.tokenizer(text_target=answer)["input_ids"]
        if self.max_target_length is not None and len(target) > self.max_target_length:
            raise row_error(
                name,
                "long",
                f"the answer has {len(target)} tokens, and the decoder takes {self.max_target_length}. Shorten the "
                "answer, or take the row out.",
            )
        return target

    def _batch(self, rows: Sequence[dict[str, Any]], read: Sequence[RowText]) -> dict[str, torch.Tensor]:
        """Batch rows that all have media, or rows that have none."""
        last = -1 if self.is_encoder_decoder else None
        shown = [
            with_media(one.messages[:last], self._reader.read(row, self._augment(row)))
            for row, one in zip(rows, read, strict=True)
        ]
        try:
            with naming_batch(rows, self.processor, "Write training.rows_per_device: 1"):
                batch, tokens = self._processed.batch(shown, [one.text for one in read])
        except UnknownPlaceholder as error:
            raise row_error(rows[0]["id"], "placeholder", str(error)) from error
        labels = [self._labels(*one) for one in zip(tokens, read, rows, strict=True)]
        made = dict(batch)
        shape = made["input_ids"].shape
        if self.max_length is not None and not self.is_encoder_decoder and shape[1] > self.max_length:
            made = {
                key: value[:, : self.max_length] if _by_token(value, shape) else value for key, value in made.items()
            }
            labels = [row[: self.max_length] for row in labels]
        made["labels"] = padded([torch.tensor(row) for row in labels], IGNORED)
        return made

    def _labels(self, tokens: Tokens, read: RowText, row: dict[str, Any]) -> list[int]:
        """Label the tokens that overlap the spans. Nothing is cut."""
        name = row["id"]
        try:
            spans, media = self._expansion.spans(read.spans, read.pieces, read.text, tokens.text)
        except UnknownPlaceholder as error:
            raise row_error(name, "placeholder", f"{error}.") from error
        of_media = tokens_in(tokens, media) if media_of(row) else []
        if read.target is not None:
            labels = read.target
        else:
            # A token may also contain the space before an answer. A token that ends before an answer is no part of it.
            learned = set(tokens_in(tokens, spans))
            labels = [token if number in learned else IGNORED for number, token in enumerate(tokens.ids)]
            if not learned:
                raise row_error(
                    name, "answer", "no token is learned; the answer is empty, or the chat template leaves it out."
                )
        self._check_length(tokens, labels, of_media, row)
        return labels

    def _check_length(self, tokens: Tokens, labels: list[int], of_media: list[int], row: dict[str, Any]) -> None:
        name, length = row["id"], len(tokens.ids)
        kinds = " and ".join(media_of(row)) or "image"
        if self.max_length is not None and not self.is_encoder_decoder and length > self.max_length:
            cuts_medium = bool(of_media) and of_media[-1] >= self.max_length
            if cuts_medium or all(label == IGNORED for label in labels[: self.max_length]):
                raise row_error(
                    name,
                    "long",
                    f"{length} tokens, {len(of_media)} of them {kinds} tokens; the first {self.max_length} hold "
                    f"no whole {kinds} and answer. Raise max_length, or take the row out.",
                )
            length = self.max_length
        if self.max_positions is not None and length > self.max_positions:
            way = "Shorten the row" if self.is_encoder_decoder else f"Write max_length: {self.max_positions} to cut it"
            raise row_error(
                name,
                "long",
                f"{length} tokens, {len(of_media)} of them {kinds} tokens, and the language model "
                f"takes {self.max_positions}. {way}, or take it out.",
            )

    def _augment(self, row: dict[str, Any]) -> Any:
        chance = random.Random(f"{self.seed} {row[DRAW]}") if DRAW in row else None
        return partial(self.augmentation, draw=chance) if self.augmentation is not None else None


def _by_token(value: Any, shape: torch.Size) -> bool:
    """Whether a value of a batch has one number per token."""
    return isinstance(value, torch.Tensor) and value.shape[:2] == shape


def _merge(parts: list[dict[str, Any]], groups: list[list[int]], pad_token: int) -> dict[str, Any]:
    """Merge a batch with media and one without, in the rows' order.

    Args:
        groups: row numbers of each part.
    """
    merged = {}
    for key, value in parts[0].items():
        is_label = key == "labels"
        if not is_label and not _by_token(value, parts[0]["input_ids"].shape):
            merged[key] = value
            continue
        fill = {"labels": IGNORED, "input_ids": pad_token}.get(key, 0)
        rows: dict[int, torch.Tensor] = {}
        for part, group in zip(parts, groups, strict=True):
            # Values that a processor makes only for media are zero for a row of text.
            like = part["labels" if is_label else "input_ids"]
            tensor = part[key] if key in part else value.new_zeros((*like.shape, *value.shape[2:]))
            rows.update(zip(group, tensor, strict=True))
        merged[key] = padded([rows[number] for number in sorted(rows)], fill)
    return merged
