"""Test on every host that the default adapter leaves the language model unchanged without an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tuner.helpers import a_token, adapted, assert_equal, frozen_logits, logits
from tests.zoo import ZOO, Batch, Case
from tests.zoo.test_zoo import applies, each_architecture

TEXT = (1, 9, 10, 11)
PER_TOKEN = {
    "chameleon": "images are tokens of the vocabulary, in the table that every token is looked up in",
    "emu3": "images are tokens of the vocabulary, in the table that every token is looked up in",
    "evolla": "the host resamples the protein again for each token",
    "gemma3n": "the host calls its image and sound embedders with each token, for tokens of their own",
    "step3p7": "the host projects the image again for each token",
    "vision-encoder-decoder": "the host projects the image again for each token",
}


def text_only(case: Case) -> Batch:
    applies(case, "text only")
    assert case.text_only is not None
    return case.text_only


def by_default(name: str) -> Any:
    """Return the architecture's model with the default branches and an adapter that is not an identity."""
    return adapted(ZOO[name](), branches=None)


@each_architecture
def test_words(name: str) -> None:
    """Without an image, the logits equal the base model's bit for bit. With an image they change."""
    case = ZOO[name]()
    with_image = frozen_logits(case)
    model = by_default(name)
    assert "text" not in model.peft_config["default"].branches
    assert not torch.allclose(logits(model, case.batch), with_image, atol=1e-4)
    prompt = text_only(case)
    assert_equal(logits(model, prompt), logits(case.model, prompt))


@each_architecture
def test_words_are_generated(name: str) -> None:
    """Greedy generation from a prompt without an image gives the base model's tokens and logits, bit for bit."""
    case = ZOO[name]()
    applies(case, "generate")
    prompt = text_only(case)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    case.model.requires_grad_(False)
    expected = case.model.generate(**prompt, **settings)
    found = by_default(name).generate(**prompt, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for step, base in zip(found.logits, expected.logits, strict=True):
        assert_equal(step, base)


@each_architecture
def test_decoding_costs_nothing(name: str) -> None:
    """After the prompt, a token runs the same kernels with and without the adapter, also with an image."""
    case = ZOO[name]()
    applies(case, "generate")
    if name in PER_TOKEN:
        pytest.skip(PER_TOKEN[name])
    inputs = case.generate_inputs()
    base = a_token(case.model, inputs)
    assert sum(base.values()) > 50
    model = by_default(name)
    assert a_token(model, inputs) == base
    if "mixed batch" not in case.not_applicable:
        assert a_token(model, {**inputs, "adapter_names": ["default", "__base__"]}) == base


@each_architecture
def test_words_beside_an_image(name: str, record_property: Callable[[str, Any], None]) -> None:
    """A row without an image gives the base model's logits, even if other rows of the batch have an image."""
    case = ZOO[name]()
    case.model.requires_grad_(False)
    batch = beside_words(case)
    try:
        expected = logits(case.model, batch)[-1]
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
        record_property("beside", "")
        pytest.skip(f"not such a batch: {type(error).__name__}")
    found = logits(by_default(name), batch)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    record_property("beside", "bits" if torch.equal(found, expected) else "rounding")


def beside_words(case: Case) -> Batch:
    """Return the case's rows and one row without an image, padded on the right."""
    if "input_ids" not in case.batch:
        pytest.skip("its prompt is the image, or no text")
    ids = case.batch["input_ids"]
    batch: Batch = {}
    for key, value in case.batch.items():
        if key == "input_ids" or (isinstance(value, torch.Tensor) and value.shape == ids.shape):
            row = torch.full_like(value[:1], -100 if key == "labels" else 0)
            if key in ("input_ids", "attention_mask"):
                words = torch.tensor(TEXT[: row.shape[1]])
                row[0, : len(words)] = words if key == "input_ids" else 1
            value = torch.cat([value, row])
        batch[key] = value
    batch.pop("labels", None)
    return batch
