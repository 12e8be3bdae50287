"""Test the adapter on the composite, with decoder-only and encoder-decoder language models."""

import json

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    Dinov2Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from tests.tuner.helpers import BOTH

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
    adapted = get_peft_model(model, CromeConfig(branches=BOTH, bottleneck_dim=4))
    sites = [status.name for status in adapted.get_layer_status() if status.module_type == "CromeLayer"]
    assert sites == [*(f"model.{site}" for site in SITES[name]), "model.vision_fusion"]
    assert adapted.get_nb_trainable_parameters()[0] == 5 * 32 * 4
    torch.testing.assert_close(adapted(**batch, labels=labels).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapter_on_composite_trains_generates_folds_and_reloads(name, tmp_path):
    model, batch, labels = build(name)
    adapted = get_peft_model(model, CromeConfig(branches=BOTH, bottleneck_dim=4, init_weights=False))
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
    adapted = get_peft_model(model, CromeConfig(branches=BOTH, bottleneck_dim=4, modules_to_save=["image_projection"]))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 5 + 2
    adapted(**batch, labels=labels).loss.backward()
    projection = [p for n, p in adapted.named_parameters() if "image_projection" in n and p.requires_grad]
    assert all(parameter.grad.abs().sum() > 0 for parameter in projection)
    assert torch.equal(adapted.unload().image_projection.weight, projection[0])


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_switching_while_merged_switches_every_branch(tmp_path):
    """Switching while merged switches every branch. PEFT unmerges the layers that report a merge, and the vision
    branch cannot be merged."""
    model, batch, labels = build("llama")
    adapted = get_peft_model(
        model, CromeConfig(branches=BOTH, bottleneck_dim=4, init_weights=False), adapter_name="a"
    ).eval()
    adapted.add_adapter("b", CromeConfig(branches=BOTH, bottleneck_dim=6, init_weights=False))
    adapted.save_pretrained(tmp_path)
    expected = {}
    with torch.no_grad():
        for name in ("b", "a"):
            adapted.set_adapter(name)
            expected[name] = adapted(**batch, labels=labels).logits
        adapted.merge_adapter()
        adapted.set_adapter("b")
        torch.testing.assert_close(adapted(**batch, labels=labels).logits, expected["b"], rtol=0, atol=0)
        adapted.merge_adapter()
        adapted.load_adapter(str(tmp_path / "a"), "x")
        adapted.set_adapter("x")
        torch.testing.assert_close(adapted(**batch, labels=labels).logits, expected["a"], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merge_is_refused_inside_a_composite_too(method):
    """A merge is refused inside a composite too. UMT5 scales its output if its head is tied, which a merge ends."""
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    LANGUAGE_MODELS["umt5"] = lambda: UMT5ForConditionalGeneration(config)
    try:
        model, batch, labels = build("umt5")
    finally:
        del LANGUAGE_MODELS["umt5"]
    adapted = get_peft_model(model, CromeConfig(branches=BOTH, bottleneck_dim=4)).eval()
    with torch.no_grad():
        before = adapted(**batch, labels=labels).logits
        with pytest.raises(ValueError, match=r"UMT5.* scales its output where config.tie_word_embeddings is set"):
            getattr(adapted, method)()
        torch.testing.assert_close(adapted(**batch, labels=labels).logits, before, rtol=0, atol=0)


def save_adapter(folder):
    """Save a composite and an adapter that names it, and return the adapted model."""
    build("llama")[0].save_pretrained(folder / "composite")
    composite = CromeVLMForConditionalGeneration.from_pretrained(folder / "composite")
    adapted = get_peft_model(composite, CromeConfig(branches=BOTH, bottleneck_dim=4, init_weights=False)).eval()
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.mark.parametrize("auto", [AutoPeftModel, CromeVLMForConditionalGeneration, AutoModelForImageTextToText])
def test_adapter_by_automatic_classes(auto, tmp_path):
    """`AutoPeftModel` loads the composite that an adapter names. The composite's class and the one of transformers
    also take an adapter's directory."""
    adapted = save_adapter(tmp_path)
    _, batch, _ = build("llama")
    with torch.no_grad():
        expected = adapted(**batch).logits
        loaded = auto.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)


def test_adapter_that_names_no_composite(tmp_path):
    save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no composite to put it on"):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "adapter")


def test_adapter_where_a_table_is_narrower_than_its_model():
    """The adapter fits a table that is narrower than its model. OPT-350m projects embeddings of 512 to the model's
    1024."""
    model, *_ = build("llama")
    settings = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    language = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=16, **settings))
    model = CromeVLMForConditionalGeneration.from_backbones(model.vision_tower, language, image_token_id=64)
    adapted = get_peft_model(model, CromeConfig(branches=BOTH, bottleneck_dim=4))
    assert adapted.get_nb_trainable_parameters()[0] == 5 * 16 * 4
