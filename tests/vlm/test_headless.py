"""Test `composite.model` and `composite.base_model`. They compute the composite's last hidden states without the head,
as LLaVA's do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peft_crome import CromeConfig
from peft_crome.vlm import CromeVLMConfig, CromeVLMForConditionalGeneration
from tests.vlm.test_qformer import qformer_batch, with_qformer
from tests.vlm.tiny import GROUPED, IMAGE_ID, build, make_batch, vision_config

CAPPED = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 4.0},
}


def add_fused_lm_head(model: Any) -> None:
    """Apply TRL's `add_fused_lm_head`, or skip the test where TRL is not installed."""
    pytest.importorskip("trl").trainer.utils.add_fused_lm_head(model)


def joined(language: str, **settings: Any) -> CromeVLMForConditionalGeneration:
    """Build a composite whose language model visibly scales or caps its logits."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CromeVLMConfig(
        vision_config=vision_config(),
        text_config=CONFIG_MAPPING[language](**GROUPED, **tokens, **settings),
        image_token_id=IMAGE_ID,
    )
    model = CromeVLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def labels_of(batch: dict[str, Any]) -> torch.Tensor:
    ids = batch["input_ids"]
    return ids.masked_fill((ids == IMAGE_ID) | (batch["attention_mask"] == 0), -100)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("language", ["llama", "gpt2", "opt"])
def test_head_of_the_last_hidden_state_gives_the_logits(language: str, side: str) -> None:
    model = build(language=language)
    batch = make_batch(model, side=side)
    with torch.no_grad():
        output, expected = model.model(**batch), model(**batch)
        assert torch.equal(model.get_output_embeddings()(output.last_hidden_state), expected.logits)
        assert torch.equal(output[0], output.last_hidden_state)
        assert torch.equal(output.image_hidden_states, expected.image_hidden_states)
        assert torch.equal(model.base_model(**batch, return_dict=False)[0], output[0])


def test_qformer_reads_its_instruction_without_the_head_too() -> None:
    model = with_qformer()
    batch = qformer_batch(model)
    with torch.no_grad():
        logits = model.get_output_embeddings()(model.model(**batch).last_hidden_state)
        assert torch.equal(logits, model(**batch).logits)


@pytest.mark.parametrize("language", sorted(CAPPED))
def test_trl_scales_and_caps_the_logits_as_the_language_model_does(language: str) -> None:
    model = joined(language, **CAPPED[language])
    batch = make_batch(model)
    labels = labels_of(batch)
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
        add_fused_lm_head(model)
        torch.testing.assert_close(model(**batch, labels=labels, fused_lm_head=True).loss, expected)
        plain = model.get_output_embeddings()(model.model(**batch).last_hidden_state)
        assert not torch.allclose(plain, model(**batch).logits, atol=1e-3), "scale and cap are visible"


@pytest.mark.parametrize("with_adapter", ["crome", "lora", "none"])
def test_gradients_are_those_of_the_whole(with_adapter: str) -> None:
    model = build()
    batch = make_batch(model)
    labels = labels_of(batch)
    wrapped: Any = model
    if with_adapter == "crome":
        wrapped = get_peft_model(model, CromeConfig(bottleneck_dim=4, init_weights=False))
    elif with_adapter == "lora":
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    gradients = []
    for fused in ({}, {"fused_lm_head": True}):
        if fused:
            add_fused_lm_head(model)
        wrapped.zero_grad()
        wrapped(**batch, labels=labels, **fused).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("name", ["vision_tower", "image_projection", "vision_fusion", "language_model"])
def test_it_has_the_composite_s_own_parts(name: str) -> None:
    model = build()
    assert getattr(model.model, name) is getattr(model, name)


def test_it_adds_nothing_to_the_composite() -> None:
    model = build()
    inner = model.model
    assert type(inner).__name__ == "CromeVLMModel"
    assert inner.base_model is inner
    assert not hasattr(inner, "model")
    assert model.get_decoder() is model.language_model
    assert not [key for key in model.state_dict() if key.startswith("model.")]
    inner.image_projection = torch.nn.Linear(24, 32)
    assert model.image_projection is inner.image_projection


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_it_goes_with_a_copy_of_the_composite(again: Callable[[Any], Any]) -> None:
    model = build()
    model.model.image_projection = torch.nn.Linear(24, 32)
    batch = make_batch(model)
    other = again(model)
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state
        assert torch.equal(other.model(**batch).last_hidden_state, expected)


def test_hooks_and_a_forward_around_the_whole_run_once() -> None:
    model = build()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    batch = make_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        own, model.forward = model.forward, lambda **kwargs: calls.append("forward") or own(**kwargs)
        assert torch.equal(model.get_output_embeddings()(model.model(**batch).last_hidden_state), expected)
        assert torch.equal(model(**batch).logits, expected)
    assert calls == ["hook", "forward", "hook"]


def test_modes_and_dropout_are_as_before_the_first_call() -> None:
    model = build().train()
    model.language_model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    model.model(**make_batch(model))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_without_a_head_are_refused() -> None:
    model = build()
    batch = make_batch(model)
    with pytest.raises(ValueError, match="has no loss"):
        model.model(**batch, labels=batch["input_ids"])


@pytest.mark.parametrize("language", ["t5", "bart"])
def test_encoder_decoder_is_refused(language: str) -> None:
    model = build(language=language)
    with pytest.raises(ValueError, match=r"no decoder that reads prompt and answer as one sequence"):
        model.model(**make_batch(model))


def test_language_model_that_does_more_than_its_head_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bert"](**sizes, vocab_size=100, is_decoder=True))
    config = CromeVLMConfig(vision_config=vision_config(), text_config=bert.config, image_token_id=IMAGE_ID)
    model = CromeVLMForConditionalGeneration(config, language_model=bert).eval()
    batch = make_batch(model)
    assert model(**batch).logits.isfinite().all()
    for _ in range(2):  # it is not taken for proven after the first
        with pytest.raises(ValueError, match="BertLMHeadModel does more than its head"):
            model.model(**batch)
