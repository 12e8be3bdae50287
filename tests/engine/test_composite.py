"""Test a composite in vLLM, with images through the plug-in's class for it, and with whole prompts as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from peft_crome.serving import ImageEncoder, export, fold
from peft_crome.serving.served import ARGUMENT, BASE_NAME
from peft_crome.vlm import CromeVLMForConditionalGeneration, CromeVLMProcessor
from tests.families.conversations import picture
from tests.vlm.tiny import CHAT_TEMPLATE, make_tokenizer, vision_config

from .conftest import ask, engine
from .hosts import HEAD, SIZES, TOKENS, agree, all_equal, generated, save_adapters

TEXT = "<image>\nWhat is this?"


@pytest.fixture
def joined(tmp_path: Path) -> tuple[Any, Any]:
    """Return a composite of a CLIP tower and a Llama, and its processor."""
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 30, "width": 30}}
    tf.CLIPImageProcessor(**size).save_pretrained(tmp_path / "vision")
    tf.CLIPVisionModel(vision_config()).save_pretrained(tmp_path / "vision")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "language")
    language = tf.LlamaConfig(
        hidden_size=HEAD, intermediate_size=48, num_hidden_layers=2, num_attention_heads=1, vocab_size=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(language)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "language")
    composite = CromeVLMForConditionalGeneration.from_backbones(
        vision=str(tmp_path / "vision"), language=str(tmp_path / "language")
    )
    return composite.eval(), CromeVLMProcessor.from_backbones(config=composite.config)


@pytest.mark.parametrize("branches", [["vision"], ["text", "vision"]], ids="-".join)
def test_images(joined: tuple[Any, Any], branches: list[str], tmp_path: Path, record: Callable[..., None]) -> None:
    composite, processor = joined
    model = save_adapters(composite, tmp_path / "adapter", ["default"], branches=branches)
    images = [picture(*size)["image"] for size in SIZES]
    inputs = [processor(images=[image], text=[TEXT], return_tensors="pt") for image in images]
    adapted = [generated(model, batch) for batch in inputs]
    export(model, tmp_path / "served", processor=processor)
    requests = [{"prompt": TEXT, "multi_modal_data": {"image": image}} for image in images]
    with engine(tmp_path / "served", max_model_len=128) as llm:
        served = ask(llm, requests, TOKENS)
        assert all_equal(served, adapted)
        if branches == ["vision"]:
            with model.disable_adapter():
                frozen = [generated(model, batch) for batch in inputs]
            base = [request | {"mm_processor_kwargs": {ARGUMENT: BASE_NAME}} for request in requests]
            assert all_equal(ask(llm, base, TOKENS), frozen)
            assert frozen != adapted
    if branches == ["vision"]:
        record("composite", images=agree(served, adapted))
        model.to(torch.bfloat16)  # the checkpoint stays in float32
        adapted = [generated(model, batch, close=0) for batch in inputs]
        with engine(tmp_path / "served", "bfloat16", max_model_len=128) as llm:
            record("composite", bfloat16=agree(ask(llm, requests, TOKENS), adapted))


def test_prompts_as_embeddings(joined: tuple[Any, Any], tmp_path: Path, record: Callable[..., None]) -> None:
    composite, processor = joined
    model = save_adapters(composite, tmp_path / "adapter", ["default"], branches=["text", "vision"])
    inputs = [processor(images=[picture(*size)["image"]], text=[TEXT], return_tensors="pt") for size in SIZES]
    adapted = [generated(model, batch) for batch in inputs]
    fold(model, tmp_path / "folded", processor.tokenizer)
    prompts = [ImageEncoder(model).prompt_embeds(**batch)[0] for batch in inputs]
    with engine(tmp_path / "folded", max_model_len=128, enable_prompt_embeds=True, limit_mm_per_prompt={}) as llm:
        served = ask(llm, [{"prompt_embeds": prompt} for prompt in prompts], TOKENS)
    record("composite", embeddings=agree(served, adapted))
    assert all_equal(served, adapted)
