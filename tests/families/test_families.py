"""Test that each tiny checkpoint loads in the ordinary way, and that its model accepts its processor's output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from . import FAMILIES, Family
from .conversations import CONVERSATIONS, each_family, encode, load, render, turn, with_template

# Processors of PaliGemma, GLM-4V and MiniCPM-V call numpy 2.4 on tensors (transformers 5.23).
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SENTENCE = "It's 37% \"ok\" - a café's naïve test; 2 < 3, no?\n\tTabs, the color of  two spaces."


@each_family
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_model_takes_what_the_processor_makes(
    family: Family, kind: str, family_checkpoint: Callable[[Family], Path]
) -> None:
    if kind == "two images" and not family.several_images:
        pytest.skip("one image to a conversation")
    if kind in ("text", "two turns") and not family.chat_template:
        pytest.skip("no chat template")
    processor, model = load(family, family_checkpoint(family))
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


@each_family
def test_a_model_answers(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    processor, model = load(family, family_checkpoint(family))
    question = CONVERSATIONS["one image"][:1]
    if family.chat_template:
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = render(processor, question, **options)
    else:
        image, text = question[0]["content"]
        prompt = text["text"] if family.encoder_decoder else family.image_token + text["text"]
        inputs = processor(images=[image["image"]], text=[prompt], return_tensors="pt")
    before = 1 if family.encoder_decoder else inputs["input_ids"].shape[1]
    answer = model.generate(**inputs.to(model.dtype), max_new_tokens=3, do_sample=False)
    assert before < answer.shape[1] <= before + 3


@each_family
def test_an_image_changes_the_answer(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    """Another image gives other logits at the last token, so the features replace the placeholders."""
    processor, model = load(family, family_checkpoint(family))
    inputs = encode(processor, family, CONVERSATIONS["one image"]).to(model.dtype)
    other = {name: -value if "pixel_values" in name else value for name, value in inputs.items()}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits[:, -1], model(**other).logits[:, -1])


VIDEO = {
    "type": "video",
    "video": torch.arange(8 * 64 * 96 * 3).remainder(251).to(torch.uint8).view(8, 64, 96, 3).numpy(),
}
SOUND = {"type": "audio", "audio": torch.sin(torch.arange(16000) / 9).numpy()}


@pytest.mark.parametrize(
    ("family", "part"),
    [
        pytest.param(family, part, id=f"{name}-{part['type']}")
        for name, family in FAMILIES.items()
        for part in [VIDEO] * family.video + [SOUND] * family.audio
    ],
)
def test_the_model_takes_video_and_sound(
    family: Family, part: dict[str, Any], family_checkpoint: Callable[[Family], Path]
) -> None:
    processor, model = load(family, family_checkpoint(family))
    conversation = [turn("user", part, "What is this?"), turn("assistant", "A cat.")]
    # Frames without their times are taken as they are.
    options = {"do_sample_frames": False} if part["type"] == "video" else {}
    inputs = render(
        processor, conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    with torch.no_grad():
        assert torch.isfinite(model(**inputs.to(model.dtype)).logits).all()
    assert any("video" in name or "pixel" in name or "feature" in name for name in inputs)


@each_family
def test_text_comes_back(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(family_checkpoint(family))
    assert tokenizer.decode(tokenizer(SENTENCE)["input_ids"], skip_special_tokens=True) == SENTENCE
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id is not None


@each_family
def test_a_processor_is_the_same_when_saved_again(
    family: Family, family_checkpoint: Callable[[Family], Path], tmp_path: Path
) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        if (family_checkpoint(family) / name).exists():
            assert (tmp_path / name).read_text() == (family_checkpoint(family) / name).read_text(), name


@each_family
def test_a_checkpoint_is_small_and_always_alike(
    family: Family, family_checkpoint: Callable[[Family], Path], tmp_path: Path
) -> None:
    first = family_checkpoint(family)
    family.build(tmp_path)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((first / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert sum((first / name).stat().st_size for name in names) < 3e6


@with_template
def test_rows_with_and_without_images_make_a_batch(
    family: Family, family_checkpoint: Callable[[Family], Path]
) -> None:
    processor, model = load(family, family_checkpoint(family))
    rows = [CONVERSATIONS["text"], CONVERSATIONS["two turns"], CONVERSATIONS["two images"]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    inputs = render(processor, rows, **options).to(model.dtype)
    for row, ids, mask in zip(rows, inputs["input_ids"], inputs["attention_mask"], strict=True):
        alone = render(processor, row, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(ids[mask.bool()], alone["input_ids"][0])
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
