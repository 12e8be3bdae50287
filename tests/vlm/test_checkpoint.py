"""Test that a composite stores what was trained and names the other weights, and that both load again strictly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    CLIPConfig,
    CLIPVisionModel,
    pipeline,
)

from peft_crome import CromeConfig
from peft_crome.vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from tests.vlm.tiny import IMAGE_ID, SEQ2SEQ, build, make_batch, text_config, vision_config

PROJECTION = {"image_projection.weight", "image_projection.bias"}
FOUR_BIT = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


def batch_for(model):
    batch = make_batch(model)
    batch["input_ids"][batch["input_ids"] == IMAGE_ID] = model.config.image_token_id
    return batch


def test_only_the_projection_is_stored(composite, tmp_path, backbones):
    composite.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == PROJECTION
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * 24 * 32 + 4 * 32 + 400
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vision_model_name_or_path"], config["text_model_name_or_path"]) == backbones


@pytest.mark.parametrize(
    ("auto", "options"),
    [
        (CromeVLMForConditionalGeneration, {}),
        (AutoModelForImageTextToText, {"attn_implementation": "sdpa", "device_map": "cpu"}),
    ],
    ids=["its own class", "an automatic class"],
)
def test_logits_of_what_is_loaded_are_equal(composite, tmp_path, auto, options):
    batch = batch_for(composite)
    composite.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(loaded(**batch).logits, composite(**batch).logits, rtol=0, atol=0)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == PROJECTION
    assert not loaded.training


def test_dtype_and_attention_reach_both_backbones(composite, tmp_path):
    composite.save_pretrained(tmp_path)
    attention = {"vision_config": "sdpa", "text_config": "eager"}
    loaded = CromeVLMForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=attention
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.vision_tower.config._attn_implementation == "sdpa"
    assert loaded.language_model.config._attn_implementation == "eager"
    loaded.save_pretrained(tmp_path / "half")
    assert CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_trained_backbone_weights_are_stored_and_survive_freezing(composite, tmp_path):
    layer = composite.language_model.model.layers[1].mlp
    layer.requires_grad_(True)
    composite.train()
    layer.up_proj.weight.data += 1
    layer.requires_grad_(False)
    composite.eval().save_pretrained(tmp_path / "a")
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "b")
    batch = batch_for(composite)
    torch.testing.assert_close(again(**batch).logits, composite(**batch).logits, rtol=0, atol=0)
    assert "language_model.model.layers.1.mlp.up_proj.weight" in load_file(tmp_path / "b/model.safetensors")


@pytest.mark.parametrize("max_shard_size", ["10KB", "1GB"])
def test_nameless_backbones_are_stored_in_full(tmp_path, max_shard_size):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    batch = make_batch(model)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*"))
    assert not list(tmp_path.glob(".saving-*"))


def test_model_objects_are_used_as_they_are(backbones):
    tower = CLIPVisionModel(vision_config())
    language = AutoModelForCausalLM.from_pretrained(backbones[1])
    model = CromeVLMForConditionalGeneration.from_backbones(vision=tower, language=language)
    assert model.vision_tower is tower
    assert model.language_model is language
    assert (model.config.vision_model_name_or_path, model.config.text_model_name_or_path) == (None, None)


def same_after_reload(model: Any, path: Path) -> set[str]:
    """Save and load a model, compare the logits, and return the stored keys."""
    batch = batch_for(model.eval())
    model.save_pretrained(path)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    return set(load_file(path / "model.safetensors"))


def test_an_object_from_a_name_may_have_changed_and_is_stored(backbones, tmp_path, caplog):
    language = AutoModelForCausalLM.from_pretrained(backbones[1])
    language.lm_head.weight.data.mul_(2.0)  # as a merged LoRA would
    model = CromeVLMForConditionalGeneration.from_backbones(vision=backbones[0], language=language)
    stored = same_after_reload(model, tmp_path / "whole")
    assert "language_model.lm_head.weight" in stored
    assert f"model.config.text_model_name_or_path = '{backbones[1]}'" in caplog.text
    language.lm_head.weight.data.div_(2.0)
    model.config.text_model_name_or_path = backbones[1]
    model._samples = {}  # of the doubled head, which is gone
    assert same_after_reload(model, tmp_path / "named") == PROJECTION


def test_weights_that_changed_without_training_are_stored(backbones, tmp_path):
    composite = CromeVLMForConditionalGeneration.from_backbones(vision=backbones[0], language=backbones[1])
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = get_peft_model(composite, lora).merge_and_unload()
    stored = {key for key in same_after_reload(merged, tmp_path) if not key.startswith("image_projection")}
    assert stored
    assert all("q_proj" in key for key in stored)
    merged.half().save_pretrained(tmp_path / "half")  # a cast is no change
    assert {key.split(".")[-2] for key in load_file(tmp_path / "half" / "model.safetensors")} == {
        "image_projection",
        "q_proj",
    }


def test_tower_of_another_resolution_is_refused_by_name(backbones, tmp_path):
    composite = CromeVLMForConditionalGeneration.from_backbones(vision=backbones[0], language=backbones[1])
    composite.save_pretrained(tmp_path / "composite")
    larger = CLIPConfig.from_pretrained(backbones[0])
    larger.vision_config.image_size = 50
    AutoModel.from_config(larger).save_pretrained(tmp_path / "larger")
    config = CromeVLMConfig.from_pretrained(tmp_path / "composite")
    config.vision_model_name_or_path = str(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"larger' has image_size=50, and this composite was made with image_size=30"):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite", config=config)


@pytest.mark.parametrize("row", [0, 41, 99])
def test_one_embedding_that_was_set_by_hand_is_stored(row, backbones, tmp_path):
    composite = CromeVLMForConditionalGeneration.from_backbones(vision=backbones[0], language=backbones[1])
    table = composite.get_input_embeddings().weight.data
    table[row] = 0.5
    loaded_from = same_after_reload(composite, tmp_path)
    assert loaded_from - PROJECTION == {"language_model.model.embed_tokens.weight"}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_changed_quantized_weights_are_refused(backbones, tmp_path):
    composite = CromeVLMForConditionalGeneration.from_backbones(
        vision=backbones[0], language=backbones[1], quantization_config=BitsAndBytesConfig(**FOUR_BIT)
    )
    composite.language_model.model.layers[0].mlp.up_proj.weight.data.zero_()
    with pytest.raises(ValueError, match="Quantized weights have changed since they were loaded"):
        composite.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_survives(backbones, tmp_path, tied):
    language = AutoModelForCausalLM.from_pretrained(backbones[1])
    language.config.tie_word_embeddings = tied
    language.tie_weights()
    language.save_pretrained(tmp_path / "language")
    composite = CromeVLMForConditionalGeneration.from_backbones(
        vision=backbones[0], language=str(tmp_path / "language"), image_token_id=3
    )
    rows = composite.get_input_embeddings().weight.shape[0]
    composite.resize_token_embeddings(rows + 5)
    stored = same_after_reload(composite, tmp_path / "composite")
    assert "language_model.model.embed_tokens.weight" in stored
    assert not any("layers" in key for key in stored)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite")
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_output_embeddings().weight.shape[0] == rows + 5
    same_after_reload(loaded, tmp_path / "again")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "bart", "t5"])
def test_a_merged_branch_of_a_tied_language_model_survives(backbones, tmp_path, kind):
    """A merged text branch survives saving and loading where the language model ties its head. The merge changes only
    the embedding table, so the head keeps its old weights."""
    torch.manual_seed(0)
    config = text_config(kind)
    config.tie_word_embeddings = True
    language = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    language.from_config(config).save_pretrained(tmp_path / "language")
    composite = CromeVLMForConditionalGeneration.from_backbones(
        vision=backbones[0], language=str(tmp_path / "language"), image_token_id=100
    )
    adapted = get_peft_model(composite, CromeConfig(bottleneck_dim=4, init_weights=False, branches=["text"])).eval()
    batch = make_batch(composite) | ({"decoder_input_ids": torch.tensor([[2, 5]] * 3)} if kind in SEQ2SEQ else {})
    with torch.no_grad():
        expected = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        merged.save_pretrained(tmp_path / "named")
        joined = CromeVLMForConditionalGeneration.from_backbones(
            merged.vision_tower, merged.language_model, image_token_id=100
        )
        joined.image_projection.load_state_dict(merged.image_projection.state_dict())
        torch.testing.assert_close(joined.eval()(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        joined.save_pretrained(tmp_path / "whole")
        for folder in ("named", "whole"):
            again = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / folder)
            torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=1e-5)
            old = merged.get_output_embeddings().weight
            torch.testing.assert_close(again.get_output_embeddings().weight, old, atol=0, rtol=0)
    assert not any("layers" in key or "block" in key for key in load_file(tmp_path / "named" / "model.safetensors"))


def test_weights_that_nothing_gives_are_refused(backbones, tmp_path):
    """Loading fails where the language model's name no longer gives a weight that the composite needs. Random weights
    would replace it otherwise."""
    language = AutoModelForCausalLM.from_pretrained(backbones[1])
    language.save_pretrained(tmp_path / "language")
    composite = CromeVLMForConditionalGeneration.from_backbones(
        vision=backbones[0], language=str(tmp_path / "language"), image_token_id=3
    )
    composite.save_pretrained(tmp_path / "composite")
    weights = load_file(tmp_path / "language" / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "language" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no \['model.layers.0.mlp.up_proj.weight'\] \(1 in all\)"):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("options", [FOUR_BIT, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_quantized_language_model_trains_saves_and_loads(backbones, tmp_path, options):
    model = CromeVLMForConditionalGeneration.from_backbones(
        vision=backbones[0], language=backbones[1], quantization_config=BitsAndBytesConfig(**options)
    )
    batch = batch_for(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.image_projection.weight.grad.abs().sum() > 0
    model.image_projection.weight.data -= 0.1 * model.image_projection.weight.grad
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == PROJECTION
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    kind = type(model.language_model.model.layers[0].mlp.up_proj)
    assert kind is not torch.nn.Linear
    assert type(loaded.language_model.model.layers[0].mlp.up_proj) is kind
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)
    config = CromeVLMConfig.from_pretrained(tmp_path)
    config.text_quantization_config = None
    plain = CromeVLMForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert type(plain.language_model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_beside_the_composite_is_attached_or_ignored(composite, tmp_path):
    batch = batch_for(composite)
    composite.save_pretrained(tmp_path)
    bare = composite(**batch).logits
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["image_projection"])
    adapted = get_peft_model(composite, lora)
    adapted.base_model.model.image_projection.modules_to_save["default"].weight.data += 1
    expected = adapted.eval()(**batch).logits
    adapted.save_pretrained(tmp_path)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected)
    torch.testing.assert_close(AutoModelForImageTextToText.from_pretrained(tmp_path)(**batch).logits, expected)
    ignored = CromeVLMForConditionalGeneration.from_pretrained(tmp_path, adapter="ignore")
    torch.testing.assert_close(ignored(**batch).logits, bare)
    with pytest.raises(ValueError, match="holds PEFT layers"):
        composite.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_crome_wraps_the_sites_while_the_projection_trains(composite, tmp_path):
    batch = batch_for(composite)
    composite.save_pretrained(tmp_path)
    bare = composite(**batch).logits
    adapted = get_peft_model(composite, CromeConfig(bottleneck_dim=4, modules_to_save=["image_projection"]))
    torch.testing.assert_close(adapted(**batch).logits, bare, rtol=0, atol=0)
    adapted.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    for parameter in trained:
        parameter.data += 0.1
    adapted.eval().save_pretrained(tmp_path)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, adapted(**batch).logits)


def test_pipeline_from_a_directory(composite, processor, tmp_path, photos):
    composite.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    content = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "w5 w6"}]
    chat = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}
    answers = [
        pipeline("image-text-to-text", model=model, processor=processor if model is composite else None)(
            text=chat, **options
        )
        for model in (composite, str(tmp_path))
    ]
    assert answers[0][0]["generated_text"] == answers[1][0]["generated_text"] != ""


def corrupt(path, case):
    file = path / "model.safetensors"
    weights = load_file(file)
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif case == "foreign":
        file.write_bytes(b"not safetensors at all")
    elif case == "absent":
        file.unlink()
    elif case == "missing":
        save_file({"image_projection.bias": weights["image_projection.bias"]}, file)
    elif case == "unexpected":
        save_file({**weights, "head.weight": torch.zeros(1)}, file)
    elif case == "unexpected in backbone":
        save_file({**weights, "language_model.model.layers.9.mlp.weight": torch.zeros(1)}, file)
    elif case == "shape":
        save_file({**weights, "image_projection.weight": torch.zeros(32, 25)}, file)
    elif case == "other model":
        (path / "config.json").write_text(json.dumps({"model_type": "llava"}))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "is truncated or not a safetensors file"),
        ("foreign", "is truncated or not a safetensors file"),
        ("absent", "has no model.safetensors"),
        ("missing", r"1 missing: \['image_projection.weight'\]"),
        ("unexpected", r"1 unexpected: \['head.weight'\]"),
        ("unexpected in backbone", r"1 unexpected: \['language_model.model.layers.9.mlp.weight'\]"),
        ("shape", r"image_projection.weight: stored \(32, 25\), expected \(32, 24\)"),
        ("other model", "is a 'llava' model, expected 'crome_vlm'"),
    ],
)
def test_bad_checkpoint_says_what_is_wrong(composite, tmp_path, case, message):
    composite.save_pretrained(tmp_path)
    corrupt(tmp_path, case)
    with pytest.raises((ValueError, OSError), match=message):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path)


def test_lost_shard_and_lost_key_of_a_full_model(tmp_path):
    build().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = next(iter(sorted(tmp_path.glob("model-00002-*"))))
    weights = load_file(shard)
    name = next(iter(weights))
    save_file({key: tensor for key, tensor in weights.items() if key != name}, shard)
    with pytest.raises(ValueError, match=f"missing weights .*{name}"):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path)


def test_moved_backbone_names_the_remedy(composite, backbones, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(backbones[1], moved)
    composite.config.text_model_name_or_path = str(tmp_path / "gone" / "away" / "x")
    composite.save_pretrained(tmp_path / "m")
    with pytest.raises(OSError, match=r"config\.text_model_name_or_path = "):
        CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "m")
    config = CromeVLMConfig.from_pretrained(tmp_path / "m")
    config.text_model_name_or_path = str(moved)
    CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "m", config=config)


def test_from_backbones_refuses_what_does_not_fit(backbones):
    join = CromeVLMForConditionalGeneration.from_backbones
    with pytest.raises(ValueError, match="LlamaModel has no language head"):
        join(vision=backbones[0], language=AutoModel.from_pretrained(backbones[1]))
    with pytest.raises(ValueError, match="image_token_id is unknown"):
        join(vision=backbones[0], language=AutoModelForCausalLM.from_config(text_config()))
    with pytest.raises(ValueError, match="is not a language model"):
        join(vision=backbones[0], language=backbones[0])
    with pytest.raises(ValueError, match="not a vision tower"):
        join(vision=backbones[1], language=backbones[1])
    with pytest.raises(ValueError, match="none for 'vision_tower'"):
        join(vision=backbones[0], language=backbones[1], device_map={"language_model": "cpu"})


def test_encoder_decoder_saves_and_loads(backbones, seq2seq_backbone, tmp_path):
    model = CromeVLMForConditionalGeneration.from_backbones(
        vision=backbones[0], language=seq2seq_backbone, image_size=20
    )
    processor = CromeVLMProcessor.from_backbones(config=model.config)
    assert processor.tokenizer.padding_side == "right"
    assert model.config.is_encoder_decoder
    model.save_pretrained(tmp_path)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    batch = {**batch_for(model), "labels": torch.tensor([[5, 6]] * 3)}
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=0, atol=0)
