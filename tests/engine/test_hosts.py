"""Each host, exported and served by vLLM with images, gives the adapted model's greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from peft_crome.serving import ImageEncoder, export
from peft_crome.serving.encoder import NOT_IN_VLLM
from peft_crome.serving.served import ARGUMENT, BASE_NAME

from .conftest import ask, engine
from .hosts import (
    HOSTS,
    TOKENS,
    agree,
    all_equal,
    build_host,
    conversations,
    generated,
    inputs_of,
    load_host,
    prompt_and_image,
    save_adapters,
)


@pytest.mark.parametrize("name", HOSTS)
def test_images(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    build_host(name, tmp_path / "host")
    model = save_adapters(load_host(tmp_path / "host"), tmp_path / "adapter", ["default"])
    export(model, tmp_path / "served", host=tmp_path / "host")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "host")
    asked = conversations(name)
    inputs = [inputs_of(name, processor, conversation) for conversation in asked]
    adapted = [generated(model, batch) for batch in inputs]
    with model.disable_adapter():
        frozen = [generated(model, batch) for batch in inputs]
    assert adapted != frozen
    prompts = [prompt_and_image(name, processor, conversation) for conversation in asked]
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for prompt, image in prompts]
    host_alone = {"mm_processor_kwargs": {ARGUMENT: BASE_NAME}}
    with engine(tmp_path / "served", enable_mm_embeds=True) as llm:
        served = ask(llm, requests, TOKENS)
        base = ask(llm, [request | host_alone for request in requests], TOKENS)
        record(name, images=agree(served, adapted))
        assert all_equal(served, adapted)
        assert all_equal(base, frozen)
        embeddings = embeddings_served(llm, model, requests, inputs)
    record(name, embeddings=None if embeddings is None else agree(embeddings, adapted))
    assert embeddings is None or all_equal(embeddings, adapted)
    assert (embeddings is None) == (name in NOT_IN_VLLM)
    model = PeftModel.from_pretrained(load_host(tmp_path / "host", torch.bfloat16), str(tmp_path / "adapter")).eval()
    adapted = [generated(model, batch, close=0) for batch in inputs]
    with engine(tmp_path / "served", "bfloat16") as llm:
        record(name, bfloat16=agree(ask(llm, requests, TOKENS), adapted))


def embeddings_served(llm: Any, model: Any, requests: list[dict[str, Any]], inputs: list[Any]) -> Any:
    """Tokens with the encoder's embeddings in the images' place; None: vLLM refuses them."""
    encoder = ImageEncoder(model)
    try:
        data = [encoder.multi_modal_data(**batch) for batch in inputs]
        given = [
            request | {"multi_modal_data": images, "mm_processor_kwargs": {ARGUMENT: BASE_NAME}}
            for request, images in zip(requests, data, strict=True)
        ]
        return ask(llm, given, TOKENS)
    except (ValueError, NotImplementedError, KeyError, AssertionError, AttributeError, TypeError) as error:
        print(f"embeddings: {type(error).__name__}: {error}")
        return None
