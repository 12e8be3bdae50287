"""Test many adapters in one engine. Each request has its own adapter, and none sees another's images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from peft_crome.serving.served import ARGUMENT, BASE_NAME
from tests.families.conversations import picture, turn

from .conftest import ask, engine, parameters
from .hosts import exported, inputs_of, request_of

COUNT, TOKENS = 64, 8
CLOSE = 1e-4  # two logits of order 1, which rounding could swap
BLOCK = 32  # tokens of the cache of prefixes: prompts are longer than one
NAMES = [f"tenant-{number}" for number in range(COUNT)]
HOST = "qwen2_vl"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, list[Any], list[dict[str, Any]]]]:
    """Return the engine, the model in transformers, and inputs and requests with an image for each adapter."""
    folder = tmp_path_factory.mktemp("many")
    case = exported(HOST, folder, NAMES)
    asked = [[turn("user", picture(60 + number, 140 - number), "What is this?")] for number in range(COUNT)]
    inputs = [inputs_of(case.processor, conversation) for conversation in asked]
    requests = [request_of(case.processor, conversation) for conversation in asked]
    settings = {"max_num_seqs": COUNT, "max_model_len": 512, "enable_prefix_caching": True, "block_size": BLOCK}
    with engine(case.served, **settings) as llm:
        yield llm, case.model, inputs, requests


def of(request: dict[str, Any], name: str) -> dict[str, Any]:
    return request | {"mm_processor_kwargs": {ARGUMENT: name}}


def in_one_batch(model: Any, inputs: list[Any], names: list[str]) -> list[list[int]]:
    """Generate one batch in transformers, in which `adapter_names` gives each row its own adapter."""
    width = max(batch["input_ids"].shape[1] for batch in inputs)

    def padded(batch: Any, key: str, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(batch[key], (width - batch[key].shape[1], 0), value=value)

    pad = model.generation_config.pad_token_id
    rows = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
    merged = {key: torch.cat([padded(batch, key, value) for batch in inputs]) for key, value in rows.items()}
    merged |= {key: torch.cat([batch[key] for batch in inputs]) for key in ("pixel_values", "image_grid_thw")}
    arguments: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        output = model.generate(**merged, adapter_names=names, **arguments)
    first, second = torch.stack(output.scores).float().topk(2).values.unbind(-1)
    assert float((first - second).min()) > CLOSE  # so that tokens can be compared, all of them
    return output.sequences[:, width:].tolist()


def test_64_requests_of_64_adapters(served: Any) -> None:
    llm, model, inputs, requests = served
    expected = in_one_batch(model, inputs, NAMES)
    assert all(one != other for one, other in zip(expected, in_one_batch(model, inputs, NAMES[::-1]), strict=True))
    found = ask(llm, [of(request, name) for request, name in zip(requests, NAMES, strict=True)], TOKENS)
    assert found == expected


def test_tenants_send_the_same_image_in_turn(served: Any) -> None:
    """Tenants that send the same image in turn get the tokens of their own adapters. The caches of processed images,
    embeddings and prefixes already hold the first tenant's data when the second asks."""
    llm, model, inputs, requests = served
    tenants = [*NAMES[:2], BASE_NAME]
    expected = in_one_batch(model, [inputs[0]] * 3, tenants)
    assert len({tuple(row) for row in expected}) == 3
    image = inputs[0]["input_ids"][0].tolist().index(model.config.image_token_id)
    llm.reset_prefix_cache()
    for own_key in ({}, {"multi_modal_uuids": {"image": ["the image"]}}):  # a client may give the image's key itself
        for again in (False, True):
            for name, tokens in zip(tenants, expected, strict=True):
                (output,) = llm.generate(of(requests[0], name) | own_key, parameters(TOKENS), use_tqdm=False)
                assert list(output.outputs[0].token_ids) == tokens
                assert (output.num_cached_tokens > image) == again  # of one's own prompt, and nobody else's


def test_a_request_without_a_name_is_refused(served: Any) -> None:
    from vllm.exceptions import VLLMNotFoundError

    llm, _, _, requests = served
    with pytest.raises(VLLMNotFoundError, match=r"names no adapter; expected one of .*'tenant-63', '__base__'"):
        ask(llm, [requests[0]], TOKENS)
    with pytest.raises(VLLMNotFoundError, match="There is no adapter 'tenant-64'; expected one of"):
        ask(llm, [of(requests[0], "tenant-64")], TOKENS)


def test_text_needs_no_adapter(served: Any) -> None:
    llm, _, _, _ = served
    assert ask(llm, [{"prompt": "What is two?"}], TOKENS)
