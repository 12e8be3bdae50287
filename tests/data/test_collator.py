"""Batches: which tokens count in the loss, for each template and kind of language model."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from peft_crome.data import CHAT_TEMPLATES, Augmentation, ConversationCollator
from peft_crome.data.collator import split_turns
from tests.vlm.conftest import CHAT_TEMPLATE, backbones, composite, make_tokenizer, processor  # noqa: F401  # fixtures


def row(*turns: tuple[str, str], images: list[str] | None = None, name: str = "r") -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        pictures = [{"type": "image"}] * (len(images or []) if number == 0 else 0)
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": name, "images": images or [], "messages": messages}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def learnt(batch: dict[str, torch.Tensor], tokenizer: Any, number: int = 0) -> str:
    labels = batch["labels"][number]
    return tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATES["plain"], CHAT_TEMPLATES["vicuna"]])
def test_answers_alone_are_learnt(template: str, processor: Any, picture: str) -> None:  # noqa: F811
    processor.chat_template = template.replace("{{ eos_token or '' }}", " {{ eos_token or '' }} ")  # words, here
    rows = [row(("w1 w2", "w3"), ("w4", "w5 w6"), images=[picture]), row(("w7", "w8"), name="text")]
    batch = ConversationCollator(processor)(rows)
    end = "</s>" if template is not CHAT_TEMPLATE else ""
    said = [learnt(batch, processor.tokenizer, number).split() for number in (0, 1)]
    assert said == [[w for w in ("w3", end, "w5", "w6", end) if w], [w for w in ("w8", end) if w]]
    image = batch["input_ids"] == processor.image_token_id
    assert image.sum(dim=1).tolist() == [processor.image_seq_length, 0]
    assert (batch["labels"][image] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["pixel_values"].shape == (1, 3, 30, 30)
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_prompt_is_the_one_of_generation(processor: Any, picture: str) -> None:  # noqa: F811
    """What precedes the answer in training is what apply_chat_template gives for answering."""
    one = row(("w1 w2", "w3"), images=[picture])
    ids = ConversationCollator(processor).encode(one)["input_ids"]
    asked = processor.apply_chat_template(
        [one["messages"][:1]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"images": [[Image.open(picture)]]},
    )["input_ids"][0].tolist()  # fmt: skip
    assert ids[: len(asked)] == asked


def test_encoder_decoder_learns_the_last_answer(processor: Any, picture: str) -> None:  # noqa: F811
    processor.chat_template = CHAT_TEMPLATES["t5"].replace("{{ eos_token", " {{ eos_token")
    rows = list(split_turns([row(("w1", "w2"), ("w3", "w4 w5"), images=[picture])]))
    assert [len(part["messages"]) for part in rows] == [2, 4]
    collator = ConversationCollator(processor, is_encoder_decoder=True, max_target_length=2)
    batch = collator(rows)
    assert [learnt(batch, processor.tokenizer, number) for number in (0, 1)] == ["w2", "w4 w5"]
    read = [processor.tokenizer.decode([t for t in ids if t < 100]).split() for ids in batch["input_ids"].tolist()]
    assert [[word for word in words if word.startswith("w")] for words in read] == [["w1"], ["w1", "w2", "w3"]]
    with pytest.raises(ValueError, match=r"Row 'long': the answer has 3 tokens, and the decoder takes 2. Shorten"):
        collator.encode(row(("w1", "w2 w3 w4"), name="long"))


def test_long_rows_are_cut_or_refused(processor: Any, picture: str) -> None:  # noqa: F811
    one = row(("w1", "w2"), ("w3", "w4"), images=[picture])
    whole = ConversationCollator(processor).encode(one)["input_ids"]
    cut = ConversationCollator(processor, max_length=len(whole) - 2).encode(one)
    assert cut["input_ids"] == whole[:-2]
    with pytest.raises(ValueError, match=r"Row 'r' has \d+ tokens, 9 of them image tokens; the first 8 hold no whole"):
        ConversationCollator(processor, max_length=8).encode(one)


def test_unreadable_pictures_name_the_row(processor: Any, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "text.jpg").write_text("no picture")
    for path in (tmp_path / "text.jpg", tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=r"Row 'bad': cannot read the image .*\. Replace the file or drop"):
            ConversationCollator(processor)([row(("w1", "w2"), images=[str(path)], name="bad")])


def test_what_the_collator_needs(processor: Any) -> None:  # noqa: F811
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template. Write chat_template: vicuna, plain or t5"):
        ConversationCollator(processor)


def test_system_message_is_put_before_rows_without_one(processor: Any) -> None:  # noqa: F811
    collator = ConversationCollator(processor, system="w80 w81")
    text = processor.tokenizer.decode(collator.encode(row(("w1", "w2")))["input_ids"])
    assert "w80 w81" in text
    own = row(("w1", "w2"))
    own["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "w82"}]})
    text = processor.tokenizer.decode(collator.encode(own)["input_ids"])
    assert "w82" in text
    assert "w80" not in text


def test_augmentation_crops_and_mirrors() -> None:
    random.seed(0)
    image = Image.new("RGB", (100, 60))
    image.paste((255, 0, 0), (0, 0, 10, 60))
    assert Augmentation()(image) is image
    mirrored = [Augmentation(horizontal_flip=True)(image).getpixel((0, 0)) == (0, 0, 0) for _ in range(200)]
    assert 70 < sum(mirrored) < 130
    sizes = {Augmentation(random_crop=True)(image).size for _ in range(100)}
    assert len(sizes) > 50
    for width, height in sizes:
        assert 0.45 <= width * height / 6000 <= 1
        assert width <= 100
        assert height <= 60
