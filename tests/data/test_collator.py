"""Test batches: which tokens count in the loss, for each template and kind of language model."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from peft_crome import CromeVLMConfig, CromeVLMProcessor
from peft_crome.data import CHAT_TEMPLATES, Augmentation, ConversationCollator, RowError, split_turns
from tests.vlm.tiny import CHAT_TEMPLATE


def row(*turns: tuple[str, str], images: list[str] | None = None, name: str = "r") -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}] * (len(images or []) if number == 0 else 0)
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": name, "images": images or [], "messages": messages}


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def learned(batch: dict[str, torch.Tensor], tokenizer: Any, number: int = 0) -> str:
    labels = batch["labels"][number]
    return tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATES["plain"], CHAT_TEMPLATES["vicuna"]])
def test_answers_alone_are_learned(template: str, processor: Any, image_file: str) -> None:
    # The tokenizer here splits at spaces alone.
    processor.chat_template = template.replace("{{ eos_token or '' }}", " {{ eos_token or '' }} ")
    rows = [row(("w1 w2", "w3"), ("w4", "w5 w6"), images=[image_file]), row(("w7", "w8"), name="text")]
    batch = ConversationCollator(processor)(rows)
    end = "</s>" if template is not CHAT_TEMPLATE else ""
    said = [learned(batch, processor.tokenizer, number).split() for number in (0, 1)]
    assert said == [[w for w in ("w3", end, "w5", "w6", end) if w], [w for w in ("w8", end) if w]]
    image = batch["input_ids"] == processor.image_token_id
    assert image.sum(dim=1).tolist() == [processor.image_seq_length, 0]
    assert (batch["labels"][image] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["pixel_values"].shape == (1, 3, 30, 30)
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


BYTE_LEVEL = {"add_prefix_space": False}


def real_tokenizer(kind: str) -> Any:
    """Train a tokenizer that keeps a space with the word after it, as byte-level BPE and SentencePiece do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**BYTE_LEVEL)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["what color is it? blue red USER: ASSISTANT: user assistant system"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (  # as Qwen 3's: the last answer is written in another way than those before it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n</think>\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(composite: Any, template: str, kind: str = "byte-level") -> CromeVLMProcessor:
    """Return a processor with this template and with a tokenizer that keeps spaces, as real ones do."""
    tokenizer = real_tokenizer(kind)
    composite.config.image_token_id = len(tokenizer)
    whole = CromeVLMProcessor.from_backbones(language=tokenizer, config=composite.config)
    whole.chat_template = template
    return whole


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("template", ["plain", "vicuna", "chatml"])
def test_whole_answers_are_learned_with_tokenizers_that_keep_spaces(
    template: str,
    kind: str,
    composite: Any,
) -> None:
    whole = with_template(composite, CHAT_TEMPLATES.get(template, CHATML), kind)
    batch = ConversationCollator(whole)([row(("what color is it?", "blue"), ("is it red?", "it is blue"))])
    end = "<|im_end|>" if template == "chatml" else "</s>"
    said = [text.strip() for text in learned(batch, whole.tokenizer).split(end)]
    assert said == ["blue", "it is blue", ""]


def test_template_that_rewrites_earlier_answers_learns_the_last(composite: Any) -> None:
    whole = with_template(composite, FORGETS)
    collator = ConversationCollator(whole)
    assert collator.needs_split
    rows = list(split_turns([row(("what color is it?", "blue"), ("is it red?", "it is blue"))]))
    said = [learned(collator([part]), whole.tokenizer) for part in rows]
    assert said == ["<think>\n</think>\nblue<|im_end|>", "<think>\n</think>\nit is blue<|im_end|>"]


THINKS = (  # as Gemma 4's and DeepSeek R1's: a prompt for generation has more than a conversation has before an answer
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n</think>\n{% endif %}"
)


def test_answers_are_learned_after_the_prompt_of_generation(composite: Any) -> None:
    whole = with_template(composite, THINKS)
    collator = ConversationCollator(whole)
    assert collator.needs_split
    for part in split_turns([row(("what color is it?", "blue"), ("is it red?", " it is blue"))]):
        encoded = collator.encode(part)
        asked = whole.apply_chat_template(part["messages"][:-1], add_generation_prompt=True, tokenize=False)
        answer = part["messages"][-1]["content"][0]["text"].strip()
        assert whole.tokenizer.decode(encoded["input_ids"]) == f"{asked}{answer}<|im_end|>"
        said = whole.tokenizer.decode([label for label in encoded["labels"] if label != -100])
        assert said == f"{answer}<|im_end|>"


def test_template_that_writes_a_prompt_by_what_is_said_is_refused(composite: Any) -> None:
    by_words = "{{ 'assistant: ' if 'red' in messages[0]['content'] else 'assistant\n' }}{%"
    whole = with_template(composite, CHATML.replace("assistant\n{%", by_words))
    collator = ConversationCollator(whole)
    collator.encode(row(("what color is it?", "blue")))
    with pytest.raises(ValueError, match=r"Row 'r': the chat template writes the prompt .* in another way"):
        collator.encode(row(("is it red?", "it is blue")))


def test_conversation_that_the_template_does_not_take_names_the_row(processor: Any) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    processor.chat_template = refuses + CHAT_TEMPLATES["plain"]
    said = r"Row 'r': the language model's chat template says: System role not supported\. Change the row"
    with pytest.raises(ValueError, match=said):
        ConversationCollator(processor, system="w3").encode(row(("w1", "w2")))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages", r"chat_template: .*unexpected end of template.*Write chat_template: vicuna, plain or t5"),
        ("{{ raise_exception('nothing goes') }}", r"chat_template: .*answer \(nothing goes\)\. Write chat_template"),
    ],
    ids=["unfinished", "raises"],
)
def test_template_that_cannot_be_read_is_refused_by_name(template: str, message: str, processor: Any) -> None:
    processor.chat_template = template
    with pytest.raises(ValueError, match=message):
        ConversationCollator(processor)


@pytest.mark.parametrize("system", [None, "color"], ids=["of the row", "of the recipe"])
@pytest.mark.parametrize("rewrites", [False, True])
def test_template_that_demands_a_system_message(rewrites: bool, system: str | None, composite: Any) -> None:
    """A template that demands a system message takes the row's own or the recipe's. Whether it rewrites earlier
    answers is still detected."""
    demands = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('give a system message') }}{% endif %}"
    filled = with_template(composite, demands + (FORGETS if rewrites else CHATML))
    plain = with_template(composite, FORGETS if rewrites else CHATML)
    asked = row(("what", "blue"), ("is it", "red"))
    own = {"role": "system", "content": [{"type": "text", "text": "color"}]}
    said = {**asked, "messages": [own, *asked["messages"]]}
    expected = ConversationCollator(plain)
    assert expected.needs_split == rewrites
    collator = ConversationCollator(filled, system=system)
    assert collator.needs_split == rewrites
    assert collator.encode(said) == expected.encode(said)
    if system:
        assert collator.encode(asked) == expected.encode(said)
    else:
        with pytest.raises(RowError, match=r"Row 'r': .*give a system message"):
            collator.encode(asked)


def test_template_of_one_question_alone_splits_rows(processor: Any) -> None:
    alone = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}"
    processor.chat_template = alone + CHAT_TEMPLATE
    assert ConversationCollator(processor).needs_split


def test_rows_in_which_nothing_is_learned_are_refused(processor: Any) -> None:
    processor.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"Row 'r': no token is learned"):
        ConversationCollator(processor).encode(row(("w1", "w2")))
    question = {"role": "user", "content": [{"type": "text", "text": "w1"}]}
    with pytest.raises(ValueError, match=r"Row 'q': the last turn is not an answer"):
        ConversationCollator(processor).encode({"id": "q", "images": [], "messages": [question]})


def test_prompt_is_the_one_of_generation(processor: Any, image_file: str) -> None:
    """In training, the tokens before the answer are those that `apply_chat_template` gives for generation."""
    from tokenizers.processors import TemplateProcessing

    # A tokenizer that begins and ends texts by itself must not do so around a template's text.
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    one = row(("w1 w2", "w3"), images=[image_file])
    ids = ConversationCollator(processor).encode(one)["input_ids"]
    asked = processor.apply_chat_template(
        [one["messages"][:1]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"images": [[Image.open(image_file)]]},
    )["input_ids"][0].tolist()  # fmt: skip
    assert ids[: len(asked)] == asked


def test_encoder_decoder_learns_the_last_answer(processor: Any, image_file: str) -> None:
    processor.chat_template = CHAT_TEMPLATES["t5"].replace("{{ eos_token", " {{ eos_token")
    rows = list(split_turns([row(("w1", "w2"), ("w3", "w4 w5"), images=[image_file])]))
    assert [len(part["messages"]) for part in rows] == [2, 4]
    collator = ConversationCollator(processor, is_encoder_decoder=True, max_target_length=2)
    batch = collator(rows)
    assert [learned(batch, processor.tokenizer, number) for number in (0, 1)] == ["w2", "w4 w5"]
    read = [processor.tokenizer.decode([t for t in ids if t < 100]).split() for ids in batch["input_ids"].tolist()]
    assert [[word for word in words if word.startswith("w")] for words in read] == [["w1"], ["w1", "w2", "w3"]]
    with pytest.raises(ValueError, match=r"Row 'long': the answer has 3 tokens, and the decoder takes 2. Shorten"):
        collator.encode(row(("w1", "w2 w3 w4"), name="long"))


def test_long_rows_are_cut_or_refused(processor: Any, image_file: str) -> None:
    one = row(("w1", "w2"), ("w3", "w4"), images=[image_file])
    whole = ConversationCollator(processor).encode(one)["input_ids"]
    cut = ConversationCollator(processor, max_length=len(whole) - 2).encode(one)
    assert cut["input_ids"] == whole[:-2]
    with pytest.raises(ValueError, match=r"Row 'r': \d+ tokens, 9 of them image tokens; the first 8 hold no whole"):
        ConversationCollator(processor, max_length=8).encode(one)


def test_rows_longer_than_the_language_model_takes_are_refused(processor: Any, image_file: str) -> None:
    one = row(("w1", "w2"), ("w3", "w4"), images=[image_file])
    length = ConversationCollator(processor).encode(one)["length"]
    assert ConversationCollator(processor, max_positions=length).encode(one)["length"] == length
    message = rf"Row 'r': {length} tokens, 9 of them image tokens, and the language model takes {length - 1}. "
    with pytest.raises(RowError, match=message + "Write max_length"):
        ConversationCollator(processor, max_positions=length - 1).encode(one)
    with pytest.raises(RowError, match=r"and the language model takes 3. Shorten the row, or take it out"):
        ConversationCollator(processor, is_encoder_decoder=True, max_positions=3).encode(one)
    cut = ConversationCollator(processor, max_positions=length - 1, max_length=length - 1).encode(one)
    assert (len(cut["input_ids"]), cut["length"]) == (length - 1, length)


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [
        (tf.BartConfig(max_position_embeddings=24), 24, 24),
        (tf.LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32), 64, 32),
        (tf.T5Config(), None, None),
        (tf.LlamaConfig(max_position_embeddings=128), 128, None),
    ],
)
def test_limits_of_language_models(config: Any, encoder: int | None, decoder: int | None) -> None:
    whole = CromeVLMConfig(vision_config=tf.CLIPVisionConfig(), text_config=config, image_token_id=1)
    limits = ConversationCollator.limits(whole)
    assert (limits["max_positions"], limits["max_target_length"]) == (encoder, decoder)


def test_image_tokens_of_the_text_itself_are_refused(processor: Any, image_file: str) -> None:
    """Image tokens in the text itself are refused, because the model would look for features of images that do not
    exist."""
    sly = row((f"w1 {processor.image_token} w2", "w3"), images=[image_file])
    with pytest.raises(
        RowError, match=r"Row 'r': 2 '<image>' in the text for 1 images. Take '<image>' out of the text"
    ):
        ConversationCollator(processor).encode(sly)


@pytest.mark.parametrize("name", ["text.jpg", "missing.png"])
def test_unreadable_images_name_the_row(name: str, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"Row 'bad': cannot read the image .*\. Replace the file or drop"):
        ConversationCollator(processor)([row(("w1", "w2"), images=[str(tmp_path / name)], name="bad")])


def test_what_the_collator_needs(processor: Any) -> None:
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template. Write chat_template: vicuna, plain or t5"):
        ConversationCollator(processor)


def test_system_message_is_put_before_rows_without_one(processor: Any) -> None:
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
    views = {Augmentation(True, True, views=3)(image).tobytes() for _ in range(60)}
    assert len(views) == 3
    other = Image.new("RGB", (100, 60), "blue")
    assert {Augmentation(True, views=3)(other).size for _ in range(60)}.isdisjoint(
        {Augmentation(True, views=3)(image).size for _ in range(60)}
    )
    mirrored = [Augmentation(horizontal_flip=True)(image).getpixel((0, 0)) == (0, 0, 0) for _ in range(200)]
    assert 70 < sum(mirrored) < 130
    sizes = {Augmentation(random_crop=True)(image).size for _ in range(100)}
    assert len(sizes) > 30
    for width, height in sizes:
        assert 0.45 <= width * height / 6000 <= 1
        assert width <= 100
        assert height <= 60
