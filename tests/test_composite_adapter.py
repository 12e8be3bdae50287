"""The adapter on the composite: decoder-only and encoder-decoder language models."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    Dinov2Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration

LANGUAGE_MODELS = {
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            scale_embedding=True,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0,
        )
    ),
}
SITES = {
    "bart": [f"language_model.model.{part}" for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")],
    "gemma3": ["language_model.model.embed_tokens"],
    "llama": ["language_model.model.embed_tokens"],
    "t5": [f"language_model.{part}" for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")],
}


def build(name):
    torch.manual_seed(0)
    tower = AutoModel.from_config(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
        )
    )
    model = CromeVLMForConditionalGeneration.from_backbones(tower, LANGUAGE_MODELS[name](), image_token_id=64)
    ids = torch.tensor([[5, 6, *[64] * model.config.image_seq_length, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    labels = torch.tensor([[9, 10, 1]]) if model.config.is_encoder_decoder else ids
    return model.eval(), batch, labels


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapter_on_composite_finds_both_sites_and_starts_as_identity(name):
    model, batch, labels = build(name)
    expected = model.requires_grad_(False)(**batch, labels=labels).logits
    adapted = get_peft_model(model, CromeConfig(bottleneck_dim=4))
    sites = [status.name for status in adapted.get_layer_status() if status.module_type == "CromeLayer"]
    assert sites == [*(f"model.{site}" for site in SITES[name]), "model.vision_fusion"]
    assert adapted.get_nb_trainable_parameters()[0] == 5 * 32 * 4
    torch.testing.assert_close(adapted(**batch, labels=labels).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapter_on_composite_trains_generates_folds_and_reloads(name, tmp_path):
    model, batch, labels = build(name)
    adapted = get_peft_model(model, CromeConfig(bottleneck_dim=4, init_weights=False))
    adapted(**batch, labels=labels).loss.backward()
    for parameter_name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("crome_" in parameter_name), parameter_name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0
    cached, uncached = (
        adapted.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(cached, uncached)

    with torch.no_grad():
        logits = adapted(**batch, labels=labels).logits
        adapted.save_pretrained(tmp_path)
        adapted.merge_adapter()
        # The table is exact where it is not scaled; a product of all its rows may still round unlike one of a few.
        exact = {"rtol": 0, "atol": 0} if name == "llama" else {}
        torch.testing.assert_close(adapted(**batch, labels=labels).logits, logits, **exact)
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(**batch, labels=labels).logits, logits, rtol=0, atol=0)
        reloaded = PeftModel.from_pretrained(build(name)[0], str(tmp_path))
        torch.testing.assert_close(reloaded(**batch, labels=labels).logits, logits, rtol=0, atol=0)


def test_projection_trains_inside_the_wrapped_site():
    model, batch, labels = build("llama")
    adapted = get_peft_model(model, CromeConfig(bottleneck_dim=4, modules_to_save=["image_projection"]))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 5 + 2
    adapted(**batch, labels=labels).loss.backward()
    projection = [p for n, p in adapted.named_parameters() if "image_projection" in n and p.requires_grad]
    assert all(parameter.grad.abs().sum() > 0 for parameter in projection)
    assert torch.equal(adapted.unload().image_projection.weight, projection[0])
