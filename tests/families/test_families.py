"""Each tiny checkpoint loads in the ordinary way, and its model takes what its processor makes of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from . import FAMILIES, Family

SENTENCE = "It's 37% \"ok\" - a café's naïve test; 2 < 3, no?\n\tTabs, the color of  two spaces."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    built: dict[str, Path] = {}

    def build(family: Family) -> Path:
        if family.missing():
            pytest.skip(f"{', '.join(family.missing())} not installed")
        if family.name not in built:
            built[family.name] = tmp_path_factory.mktemp(family.name)
            family.build(built[family.name])
        return built[family.name]

    return build


def picture(width: int, height: int) -> dict[str, Any]:
    """A part with an image whose pixels differ, drawn from its size."""
    noise = torch.Generator().manual_seed(width * height)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
    return {"type": "image", "image": Image.fromarray(pixels.numpy())}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one image": [turn("user", picture(181, 97), "What is this?"), turn("assistant", "A red cat.")],
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

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def encode(processor: Any, family: Family, conversation: list[dict[str, Any]]) -> Any:
    if family.chat_template:
        return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
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


@each_family
@pytest.mark.parametrize("kind", CONVERSATIONS)
# PaliGemma's processor calls np.array on tensors (transformers 5.23, processing_paligemma.py).
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_model_takes_what_the_processor_makes(
    family: Family, kind: str, checkpoint: Callable[[Family], Path]
) -> None:
    directory = checkpoint(family)
    if kind == "two images" and not family.several_images:
        pytest.skip("one image to a conversation")
    if kind in ("text", "two turns") and not family.chat_template:
        pytest.skip("no chat template")
    processor = tf.AutoProcessor.from_pretrained(directory)
    model = getattr(tf, family.auto_class).from_pretrained(directory)
    # Llama 4's image processor gives bfloat16.
    inputs = encode(processor, family, CONVERSATIONS[kind]).to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    token = processor.tokenizer.convert_tokens_to_ids(family.image_token)
    images = sum(part["type"] == "image" for message in CONVERSATIONS[kind] for part in message["content"])
    placeholders = (inputs["input_ids"] == token).sum().item()
    assert (placeholders >= images) if images else (placeholders == 0)
    assert inputs["input_ids"].max() < model.get_input_embeddings().weight.shape[0]
