"""Conversations for every family, and functions that load and call its processor and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from .family import FAMILIES, Family
from .parts import real_towers

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
with_template = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if family.chat_template],
    ids=[name for name, family in FAMILIES.items() if family.chat_template],
)


def picture(width: int, height: int) -> dict[str, Any]:
    """Return a message part with an image of random pixels, which depend only on its size."""
    noise = torch.Generator().manual_seed(width * height)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
    return {"type": "image", "image": Image.fromarray(pixels.numpy())}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one image": [turn("user", picture(701, 419), "What is this?"), turn("assistant", "A red cat.")],
    "two images": [
        turn("user", picture(211, 130), picture(64, 150), "What differs?"),
        turn("assistant", "The colors do."),
    ],
    "text": [turn("user", "What is two?"), turn("assistant", "A number.")],
    "two turns": [
        turn("user", picture(97, 181), "What is this?"),
        turn("assistant", "A red cat."),
        turn("user", "Is it a dog?"),
        turn("assistant", "No, a cat."),
    ],
}


def render(processor: Any, conversation: list[dict[str, Any]], **options: Any) -> Any:
    """Call `apply_chat_template` with the template itself. Phi-4's loaded processor leaves the template to its
    tokenizer."""
    template = processor.chat_template or processor.tokenizer.chat_template
    return processor.apply_chat_template(conversation, chat_template=template, **options)


def load(family: Family, directory: Path) -> tuple[Any, Any]:
    """Load the processor and the model as a user does."""
    with real_towers():
        model = getattr(tf, family.auto_class).from_pretrained(directory)
    return tf.AutoProcessor.from_pretrained(directory), model


def encode(processor: Any, family: Family, conversation: list[dict[str, Any]]) -> Any:
    """Return the model's inputs for a conversation. Without a chat template, only its first question and answer are
    used."""
    if family.chat_template:
        return render(processor, conversation, tokenize=True, return_dict=True, return_tensors="pt")
    parts = conversation[0]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    text = next(part["text"] for part in parts if part["type"] == "text")
    answer = conversation[1]["content"][0]["text"]
    if family.encoder_decoder:
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        inputs["labels"] = processor.tokenizer(answer, return_tensors="pt")["input_ids"]
        return inputs
    return processor(
        images=[images], text=[family.image_token * len(images) + text], suffix=[answer], return_tensors="pt"
    )
