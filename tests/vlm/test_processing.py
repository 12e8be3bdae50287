"""Test that the processor turns text and images into the model's inputs."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from peft_crome.vlm import CromeVLMProcessor
from tests.vlm.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]
MIXED = ["<image> w1", "w2 w3", "w4 <image> <image>"]


def test_rows_of_any_mix(processor, composite, photos):
    a, b, c = photos
    batch = processor(images=[[a], [], [b, c]], text=MIXED, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert (batch["input_ids"] == composite.config.image_token_id).sum(1).tolist() == [9, 0, 18]
    assert composite(**batch).logits.isfinite().all()
    assert "pixel_values" not in processor(text=["w1"], images=None)
    assert processor(images=a, text="<image> w1")["input_ids"][0].count(processor.image_token_id) == 9
    assert processor(images=[[]], text=["w1"])["input_ids"]


@pytest.mark.parametrize(
    "form", [lambda a, b, c: [a, b, c], lambda a, b, c: [a, None, [b, c]]], ids=["one list", "a list where needed"]
)
def test_other_forms_of_the_same_images(processor, photos, form):
    a, b, c = photos
    batch = processor(images=[[a], [], [b, c]], text=MIXED, padding=True, return_tensors="pt")
    same = processor(images=form(a, b, c), text=MIXED, padding=True, return_tensors="pt")
    assert all(torch.equal(same[name], batch[name]) for name in batch)


def test_pad_is_the_end_token_and_masked_by_length(processor):
    batch = processor(text=["w1 </s>", "w1 w2 w3"], padding=True, return_tensors="pt")
    assert processor.tokenizer.pad_token == "</s>"
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["input_ids"][0].tolist()[0] == batch["input_ids"][0].tolist()[2] == 2


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([[0], [1]], ["<image>", "w1"], "Row 1 has 0 <image> in its text and 1 images"),
        ([[0], [1]], ["<image> <image>", "<image>"], "Row 0 has 2 <image> in its text and 1 images"),
        ([0, 1], ["<image>", "w1"], r"texts hold 1 <image> \(\[1, 0\] per row\), but 2 images"),
        (None, ["w1", "<image>"], "Row 1 has 1 <image> in its text and 0 images"),
        ([[0], [1]], ["<image>"] * 3, "images for 2 rows and 3 texts"),
    ],
)
def test_wrong_counts_name_the_row(processor, photos, images, text, message):
    pick = [[photos[i] for i in r] if isinstance(r, list) else photos[r] for r in images] if images else None
    with pytest.raises(ValueError, match=message):
        processor(images=pick, text=text)


def test_truncation_inside_an_image_is_refused(processor, photos):
    with pytest.raises(ValueError, match="Row 1 has 9 image tokens, of which truncation keeps 4"):
        processor(images=[[], [photos[0]]], text=["w1", "w1 <image>"], truncation=True, max_length=5)
    assert len(processor(images=photos[0], text="<image> w1 w2", truncation=True, max_length=10)["input_ids"][0]) == 10


def test_chat_template_sees_plain_strings(processor, photos):
    content = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "w5"}]
    chat = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": content},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "user: w1 assistant: w2 user: <image>\nw5 assistant:"
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat, **options)
    expected = processor(images=photos[0], text=text, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    both = processor.apply_chat_template([chat, chat[:1]], processor_kwargs={"padding": True}, **options)
    assert both["input_ids"].shape[0] == 2
    assert both["pixel_values"].shape[0] == 1
    assert chat[2]["content"] is content
    with pytest.raises(ValueError, match="'video' is not supported"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("content", ["parts", "string"])
def test_images_after_the_words_of_their_turn(content, processor, tmp_path):
    """With `images_after_text`, the chat template puts a user turn's images after its words, as in the paper. The
    setting is saved with the processor."""
    token = processor.image_token
    said = f"{token}\nw1 w2 {token} w3"
    parts = [{"type": "image"}, {"type": "text", "text": "w1 w2 "}, {"type": "image"}, {"type": "text", "text": " w3"}]
    turns = [{"role": "user", "content": parts if content == "parts" else said}]
    turns += [{"role": "assistant", "content": f"w4 {token} w5"}, {"role": "user", "content": token}]
    given = processor.apply_chat_template(turns)
    assert given.index(token) < given.index("w1")
    ordered = copy.deepcopy(processor)
    ordered.images_after_text = True
    ordered.save_pretrained(tmp_path)
    text = CromeVLMProcessor.from_pretrained(tmp_path).apply_chat_template(turns)
    assert text == f"user: w1 w2 w3\n{token}{token} assistant: w4 {token} w5 user: {token} "
    assert not CromeVLMProcessor(processor.image_processor, processor.tokenizer).images_after_text


def test_no_chat_template_says_what_to_do(processor):
    bare = CromeVLMProcessor(processor.image_processor, make_tokenizer(), image_seq_length=9)
    with pytest.raises(ValueError, match=r"has no chat template\. Write the prompt yourself"):
        bare.apply_chat_template([{"role": "user", "content": "w1"}])


def test_save_and_load(processor, tmp_path, photos):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CromeVLMProcessor
    assert loaded.tokenizer.padding_side == "left"
    text = ["<image> w1", "w2"]
    expected = processor(images=photos[:1], text=text, padding=True, return_tensors="pt")
    found = loaded(images=photos[:1], text=text, padding=True, return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.batch_decode(found["input_ids"], skip_special_tokens=True) == ["w1", "w2"]
    assert loaded.chat_template == processor.chat_template


def test_auto_processor_needs_the_import_alone(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    code = "import tests.torchvision_on_cpu; import peft_crome.vlm, sys; from transformers import AutoProcessor; "
    code += "print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "CromeVLMProcessor", run.stderr


def test_model_and_processor_agree_on_token_and_size(backbones, composite):
    small = type(composite).from_backbones(
        vision=backbones[0], language=backbones[1], image_size=[20, 40], vision_pool_size=2
    )
    processor = CromeVLMProcessor.from_backbones(config=small.config)
    assert processor.image_token_id == small.config.image_token_id == len(make_tokenizer())
    assert small.config.image_seq_length == processor.image_seq_length == 2
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match=r"image token '<image>' has id 96, the model expects 95"):
        CromeVLMProcessor.from_backbones(language=tokenizer, config=small.config)
    assert "<image>" not in tokenizer.get_vocab()
    own = make_tokenizer(extra_special_tokens={"image_token": "w7"})
    joined = CromeVLMProcessor.from_backbones(language=own, config=_with_id(small.config, 12))
    assert (joined.image_token, joined.image_token_id) == ("w7", 12)


def _with_id(config, image_token_id):
    config.image_token_id = image_token_id
    return config
