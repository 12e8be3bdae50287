"""Test how each chat template renders turns, prompts, words and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf

from . import Family
from .conversations import CONVERSATIONS, picture, render, turn, with_template

ASKED = [turn("user", "before", picture(64, 64), " after "), turn("assistant", " said "), turn("user", "more")]


@with_template
def test_the_end_of_a_turn(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    first, last = (message["content"][0]["text"] for message in CONVERSATIONS["two turns"][1::2])
    text = render(processor, CONVERSATIONS["two turns"])
    between, after = text.partition(first)[2], text.partition(last)[2]
    if family.end_of_turn is None:
        assert not after.strip()
        assert family.name == "glm4v" or "<" not in between
        return
    assert family.end_of_turn in between
    assert (family.end_of_turn in after) == family.closes_last
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(family.end_of_turn, add_special_tokens=False)
    assert ids == [tokenizer.convert_tokens_to_ids(family.end_of_turn)]
    generation = tf.GenerationConfig.from_pretrained(family_checkpoint(family))
    assert ids[0] in generation.eos_token_id


@with_template
def test_what_a_template_does_with_words_and_images(
    family: Family, family_checkpoint: Callable[[Family], Path]
) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    text = render(processor, ASKED)
    between = text.partition("before")[2].partition("after")[0]
    assert (not between.strip()) == family.images_first
    assert (" said " not in text) == family.strips


@pytest.mark.parametrize("first", ["user", "assistant"])
@with_template
def test_turns_that_do_not_alternate(family: Family, first: str, family_checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    refused = [turn(first, "one"), *ASKED]
    if family.alternates:
        with pytest.raises(Exception, match="alternate"):
            render(processor, refused)
    else:
        assert render(processor, refused)


@with_template
def test_a_system_message(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    conversation = [turn("system", "Be brief."), *CONVERSATIONS["text"]]
    if not family.system:
        with pytest.raises(Exception, match="alternate"):
            render(processor, conversation)
    else:
        assert "Be brief." in render(processor, conversation[:2], add_generation_prompt=True)
        assert ("Be brief." in render(processor, conversation)) == family.keeps_system


@with_template
def test_what_a_prompt_and_its_answer_share(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    asked = [turn("system", "Be brief.")] * family.system + CONVERSATIONS["two turns"][:1]
    answered = asked + CONVERSATIONS["two turns"][1:2]
    prompt = render(processor, asked, add_generation_prompt=True)
    said = render(processor, answered)
    assert said.startswith(prompt) == family.prompt_is_prefix
    assert render(processor, answered + CONVERSATIONS["two turns"][2:]).startswith(said) == family.keeps_turns


@with_template
def test_words_that_the_template_marks(family: Family, family_checkpoint: Callable[[Family], Path]) -> None:
    processor = tf.AutoProcessor.from_pretrained(family_checkpoint(family))
    template = processor.chat_template or processor.tokenizer.chat_template
    assert ("generation %}" in template.replace("{%- ", "{% ")) == family.generation
    if not family.generation:
        return
    inputs = render(
        processor, CONVERSATIONS["two turns"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if mask]
    # LLaVA 1.5 marks the space behind an answer as well, whose token is the next turn's "▁U".
    text = processor.tokenizer.decode(marked).replace("USER", "").replace("U", "")
    assert text.split() == ["A", "red", "cat.", "No,", "a", "cat."]
