"""Test that the collator makes the same batches as each family's processor, with labels on the answers alone."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image

from peft_crome.data import ConversationCollator, RowError, split_turns
from peft_crome.data.processed import with_template
from peft_crome.data.row_text import RowSize, or_error

from . import FAMILIES, Family

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # GLM-4V's processor, with numpy 2.4

Row = dict[str, Any]
SIZES = {"wide": (181, 97), "tall": (97, 311), "small": (60, 64), "large": (900, 640)}
TEMPLATED = [family for family in FAMILIES.values() if family.chat_template]
each_family = pytest.mark.parametrize("family", TEMPLATED, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write images whose pixels differ, and return their files by name."""
    folder, files = tmp_path_factory.mktemp("images"), {}
    for name, (width, height) in SIZES.items():
        noise = torch.Generator().manual_seed(width * height)
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
        files[name] = str(folder / f"{name}.png")
        Image.fromarray(pixels.numpy()).save(files[name])
    return files


def row(name: str, *turns: Any, images: tuple[str, ...] = ()) -> Row:
    """Return a conversation in which user and assistant take turns. Each None stands for an image of the row."""
    messages = []
    for number, parts in enumerate(turns):
        parts = parts if isinstance(parts, tuple) else (parts,)
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return {"id": name, "messages": messages, "images": list(images)}


def rows_of(family: Family, images: dict[str, str]) -> list[Row]:
    """Return conversations of every kind that a family accepts."""
    rows = [
        row("one", (None, "What is this?"), "A red cat.", images=(images["wide"],)),
        row("large", (None, "What is this?\n Look."), " A cat, a red cat. ", images=(images["large"],)),
        row(
            "turns",
            (None, "What?"),
            "A cat.",
            "Is it a dog? A cat.",
            "No.",
            "A cat.",
            "A cat.",
            images=(images["tall"],),
        ),
        row("text", "What is two?", "A number.", "And three?", "A number."),
    ]
    if family.several_images:
        rows += [
            row("two", (None, None, "What differs?"), "The colors.", images=(images["wide"], images["small"])),
            row(
                "later",
                (None, "What?"),
                "A cat.",
                ("Now", None, "what?"),
                "A cat.",
                images=(images["small"], images["tall"]),
            ),
        ]
    return rows


def conversation(one: Row) -> list[dict[str, Any]]:
    """Return the messages with their images, as a user gives them to the processor."""
    files = map(load_image, one["images"])
    return [
        {
            **m,
            "content": [{"type": "image", "image": next(files)} if p["type"] == "image" else p for p in m["content"]],
        }
        for m in one["messages"]
    ]


def processed(processor: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    return with_template(processor).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def slow_labels(processor: Any, one: Row, only: int | None) -> list[int]:
    """Return the labels of each answer, or of one answer. They come from the processor's output before the answer and
    after it."""
    messages = conversation(one)
    ids = processed(processor, messages)["input_ids"][0].tolist()
    labels = [-100] * len(ids)
    for end in range(1, len(messages), 2) if only is None else [only]:
        first = processed(processor, messages[:end], add_generation_prompt=True)["input_ids"].shape[1]
        through = processed(processor, messages[: end + 1])["input_ids"][0].tolist()
        assert ids[: len(through) - 1] == through[:-1], "the template does not write turns one after another"
        while not processor.tokenizer.decode(through[-1:]).strip():
            through.pop()
        labels[first : len(through)] = ids[first : len(through)]
    return labels


@each_family
def test_batch_and_labels_are_the_processors_own(
    family: Family, family_checkpoint: Callable[[Family], Path], images: dict[str, str]
) -> None:
    """A batch equals the processor's own bit for bit, and its labels equal those found one answer after another."""
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    collator = ConversationCollator(processor)
    rows = rows_of(family, images)
    for one in split_turns(rows) if collator.needs_split else rows:
        batch = collator([one])
        if collator.template.writes_prompts_apart:  # an answer is learned after the prompt that it will follow
            prompt = processed(processor, conversation(one)[:-1], add_generation_prompt=True)
            length = prompt.pop("input_ids").shape[1]
            shown = {name: value for name, value in prompt.items() if value.shape[:2] != (1, length)}
            assert all(torch.equal(batch[name], value) for name, value in shown.items()), one["id"]
            assert (batch["labels"][0, :length] == -100).all()
            assert torch.equal(batch["labels"][0, length:], batch["input_ids"][0, length:])
            continue
        expected = processed(processor, conversation(one))
        assert batch.keys() == {*expected.keys(), "labels"}, one["id"]
        for name, value in expected.items():
            assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), (one["id"], name)
        last = len(one["messages"]) - 1 if collator.needs_split else None
        assert batch["labels"][0].tolist() == slow_labels(processor, one, last), one["id"]
        assert (batch["labels"] >= 0).any()


@each_family
def test_rows_are_measured_by_their_headers(
    family: Family, family_checkpoint: Callable[[Family], Path], images: dict[str, str]
) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    collator = ConversationCollator(processor)
    rows = rows_of(family, images)
    for one, size in zip(rows, collator.measure(rows), strict=True):
        batch, encoded = collator([one]), collator.encode(one)
        assert encoded["input_ids"] == batch["input_ids"][0].tolist(), one["id"]
        assert encoded["labels"] == batch["labels"][0].tolist()
        assert encoded["length"] == batch["input_ids"].shape[1]
        assert size == RowSize(encoded["length"], encoded["length"])


WORDS = st.lists(
    st.sampled_from(["a cat", "red", "Is it?", "\n", "  ", "é", "猫", "<", "User:", "."]), min_size=1
).map("".join)
SAID = st.lists(st.tuples(WORDS, WORDS).filter(lambda pair: all(map(str.strip, pair))), min_size=1, max_size=3)


@each_family
@given(
    said=st.lists(SAID, min_size=1, max_size=3), shown=st.lists(st.sampled_from([*SIZES]), max_size=3), data=st.data()
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_are_the_processors_own(
    family: Family,
    said: list[list[tuple[str, str]]],
    shown: list[str],
    data: st.DataObject,
    family_checkpoint: Callable[[Family], Path],
    images: dict[str, str],
) -> None:
    """Rows that are measured together have the processor's own token counts, with and without images. This also holds
    with a limit that some rows exceed."""
    processor = processor_of(family, family_checkpoint)
    rows = []
    for number, pairs in enumerate(said):
        files = tuple(images[name] for name in shown[: 1 + family.several_images])[: number + 1]
        turns = [part for pair in pairs for part in pair]
        rows.append(row(str(number), (*[None] * len(files), turns[0]), *turns[1:], images=files))
    lengths = []
    for one in rows:
        whole = conversation(one)
        ids = processed(processor, whole)["input_ids"]
        if ConversationCollator(processor).template.writes_prompts_apart:
            ids = ConversationCollator(processor)([one])["input_ids"]
        lengths.append(ids.shape[1])
    limit = data.draw(st.sampled_from([None, *lengths, *(length - 1 for length in lengths)]))
    collator = ConversationCollator(processor, max_length=limit)
    for one, size, length in zip(rows, collator.measure(rows), lengths, strict=True):
        closely = or_error(collator.encode, one)
        if isinstance(closely, RowError):
            assert isinstance(size, RowError)
            assert size.faults == closely.faults
        else:
            assert size == RowSize(length, len(closely["input_ids"]))


@functools.cache
def processor_of(family: Family, family_checkpoint: Callable[[Family], Path]) -> Any:
    return tf.AutoProcessor.from_pretrained(family_checkpoint(family))


@each_family
def test_a_mixed_batch_trains(
    family: Family, family_checkpoint: Callable[[Family], Path], images: dict[str, str]
) -> None:
    folder = family_checkpoint(family)
    processor = tf.AutoProcessor.from_pretrained(folder)
    collator = pickle.loads(pickle.dumps(ConversationCollator(processor)))  # as in a worker
    rows = rows_of(family, images)
    batch = collator(rows)
    for one, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        alone = collator([one])
        length = alone["input_ids"].shape[1]
        assert torch.equal(ids[:length], alone["input_ids"][0])
        assert mask.sum() == length
        assert torch.equal(labels[:length], alone["labels"][0])
        assert (labels[length:] == -100).all()
    model = getattr(tf, family.auto_class).from_pretrained(folder).eval()
    with torch.no_grad():
        given = tf.BatchFeature(batch).to(dtype=model.dtype)
        assert torch.isfinite(model(**given).loss)


@each_family
def test_no_image_is_cut(family: Family, family_checkpoint: Callable[[Family], Path], images: dict[str, str]) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    one = row("one", (None, "What is this?"), "A red cat. " * 8, images=(images["wide"],))
    whole = ConversationCollator(processor)([one])
    length = whole["input_ids"].shape[1]
    cut = ConversationCollator(processor, max_length=length - 3)([one])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :-3])
    assert torch.equal(cut["labels"], whole["labels"][:, :-3])
    first = int((whole["labels"][0] >= 0).nonzero()[0])
    with pytest.raises(RowError, match="Raise max_length"):
        ConversationCollator(processor, max_length=first)([one])


@each_family
def test_a_model_learns_to_stop(
    family: Family, family_checkpoint: Callable[[Family], Path], images: dict[str, str]
) -> None:
    """An answer ends with the tokenizer's end token if the template does not end it. Otherwise the labels do not
    change."""
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    plain, ending = ConversationCollator(processor), ConversationCollator(processor, ends_answers=True)
    one = rows_of(family, images)[0]
    before, after = plain([one])["labels"][0], ending([one])["labels"][0]
    stops = [label for label in after.tolist() if label >= 0]
    if family.end_of_turn is None or not family.closes_last:
        assert stops[-1] == processor.tokenizer.eos_token_id
        assert stops[:-1] == [label for label in before.tolist() if label >= 0]
    else:
        assert torch.equal(before, after)
        assert family.end_of_turn in processor.tokenizer.decode(stops)
