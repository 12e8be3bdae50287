"""Test that any tower's prefix tokens and patch grid are detected, and that its patches are pooled in order."""

import re

import pytest
import torch
import transformers as tf

from peft_crome.vlm import CromeVLMConfig, CromeVLMForConditionalGeneration
from peft_crome.vlm.image_size import fixed_image_size, with_image_size
from peft_crome.vlm.vision import find_vision_model
from tests.vlm.tiny import FULL_VIT, TOWERS, build, make_batch, text_config


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_tower_gives_its_patches(tower, layer):
    model = build(tower, vision_feature_layer=layer)
    batch = make_batch(model)
    features = model.get_vision_features(batch["pixel_values"])
    assert features.shape == (3, model.config.image_seq_length, model.vision_layout.hidden_size)
    assert not features.requires_grad or any(p.requires_grad for p in model.vision_tower.parameters())
    if layer == -1:
        _, prefix, patches = TOWERS[tower]
        assert (model.vision_layout.num_prefix_tokens, model.config.image_seq_length) == (prefix, patches)
    assert model(**batch).logits.isfinite().all()


def test_registers_are_dropped_or_kept():
    dropped, kept = (
        build("dinov2_with_registers", vision_feature_select_strategy=strategy) for strategy in ("default", "full")
    )
    pixels = torch.randn(1, 3, 30, 30)
    raw = dropped.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(dropped.get_vision_features(pixels), raw[:, 8:])
    torch.testing.assert_close(kept.get_vision_features(pixels), raw)


def test_pooling_averages_neighboring_patches():
    model = build("dinov2", image_size=40, vision_pool_size=2)
    pixels = torch.randn(1, 3, 40, 40)
    patches = model.vision_tower(pixels).last_hidden_state[0, 1:].reshape(4, 4, -1)
    expected = [patches[r : r + 2, c : c + 2].mean((0, 1)) for r in (0, 2) for c in (0, 2)]
    torch.testing.assert_close(model.get_vision_features(pixels)[0], torch.stack(expected))
    assert model.config.image_seq_length == 4


def test_pooling_that_does_not_divide_the_grid_names_those_that_do():
    with pytest.raises(
        ValueError, match=r"vision_pool_size=2 does not divide the 3 x 3 patch grid; choose one of \[1, 3\]"
    ):
        build(vision_pool_size=2)


@pytest.mark.parametrize("tower", ["clip_vision_model", "vit", "siglip_vision_model", "dinov2"])
def test_other_resolution_interpolates_positions(tower):
    model = build(tower, image_size=[40, 20])
    assert (model.vision_layout.height, model.vision_layout.width) == (4, 2)
    assert model(**make_batch(model)).logits.isfinite().all()


def test_a_size_that_the_tower_cannot_read_names_its_own() -> None:
    tower, language = tf.Aimv2VisionModel(tf.Aimv2VisionConfig(**FULL_VIT)), build().language_model
    sizes = {"image_token_id": 100, "image_size": [40, 20]}
    said = r"Aimv2VisionModel cannot read pixel_values of shape \(1, 3, 40, 20\): .*\. Write image_size=30, or pass an"
    with pytest.raises(ValueError, match=said):
        CromeVLMForConditionalGeneration.from_backbones(tower, language, **sizes)


def test_size_of_a_timm_tower_is_what_it_was_trained_on() -> None:
    timm = tf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", pretrained_cfg={"input_size": [3, 256, 192]})
    assert CromeVLMConfig(vision_config=timm, text_config=text_config()).image_height_width == (256, 192)


def test_timm_processor_names_one_that_can_be_saved() -> None:
    class TimmWrapperImageProcessor:
        data_config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9} | {
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
        }

    with pytest.raises(ValueError, match="cannot be saved with a composite") as raised:
        with_image_size(TimmWrapperImageProcessor(), 224, 224)
    processor = eval(
        re.search(r"vision=(CLIPImageProcessor\(.*\))\.$", str(raised.value))[1],
        {"CLIPImageProcessor": tf.CLIPImageProcessor},
    )
    assert (processor.size["shortest_edge"], processor.resample, processor.image_std) == (248, 3, (0.25,) * 3)
    assert fixed_image_size(processor) == (224, 224)


def test_missing_layer_names_the_range():
    with pytest.raises(ValueError, match=r"vision_feature_layer=7: .* has 4 hidden states; choose from -4 to 3"):
        build(vision_feature_layer=7)


def test_language_model_is_no_tower():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a vision tower"):
        find_vision_model(build().language_model)


def test_frozen_tower_stays_in_evaluation_mode():
    model = build()
    model.vision_tower.requires_grad_(False)
    model.train()
    assert model.language_model.training
    assert not model.vision_tower.training
    model.vision_tower.requires_grad_(True)
    assert model.train().vision_tower.training


@pytest.mark.parametrize("features", ["pooled", "patches", "whole"])
def test_vision_features_replace_pixel_values(features):
    model = build("dinov2", image_size=40, vision_pool_size=2)
    batch = make_batch(model)
    expected = model(**batch).logits
    pixels = batch.pop("pixel_values")
    raw = model.vision_tower(pixels).last_hidden_state
    given = {"pooled": model.get_vision_features(pixels), "patches": raw[:, 1:], "whole": raw}[features]
    torch.testing.assert_close(model(**batch, vision_features=given).logits, expected)


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 30, "patch_size": 10}


@pytest.mark.parametrize(
    ("model_class", "config", "tower"),
    [
        (tf.CLIPVisionModelWithProjection, tf.CLIPVisionConfig(projection_dim=16, **SMALL), tf.CLIPVisionModel),
        (tf.ViTForImageClassification, tf.ViTConfig(**SMALL), tf.ViTModel),
    ],
)
def test_a_head_is_left_out(model_class, config, tower, tmp_path):
    composite = CromeVLMForConditionalGeneration.from_backbones(
        model_class(config), build().language_model, image_token_id=100
    )
    assert type(composite.vision_tower) is tower
    composite.save_pretrained(tmp_path)
    loaded = CromeVLMForConditionalGeneration.from_pretrained(tmp_path)
    batch = make_batch(composite)
    torch.testing.assert_close(loaded(**batch).logits, composite(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_class", "config", "because"),
    [
        (tf.ViTMAEModel, tf.ViTMAEConfig(**SMALL), "may hide patches at random, .* with ViTModel"),
        (tf.Dinov2Backbone, tf.Dinov2Config(**SMALL), "gives feature maps for detection"),
        (tf.Siglip2VisionModel, tf.Siglip2VisionConfig(hidden_size=24, num_attention_heads=2), ".* are cut up"),
    ],
)
def test_what_gives_no_features_of_every_patch_is_refused(model_class, config, because):
    with pytest.raises(ValueError, match=f"{model_class.__name__} {because}.*Pass another tower"):
        find_vision_model(model_class(config))
