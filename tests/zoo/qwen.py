"""Builders of Qwen-VL and similar hosts, whose vision tower ends in a merger."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

from .case import (
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    PATCH,
    TEXT,
    VISION_WIDTH,
    WIDTH,
    Batch,
    Case,
    architecture,
    finish,
    pixels,
    rope,
    token_rows,
    words,
)

TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 59, "vision_start_token_id": 57, "vision_end_token_id": 58}
ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
INTERLEAVED = ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
HALF_OF_A_HEAD: dict[str, Any] = ROPE | {
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.5,
}
MERGED: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": WIDTH,
}
TOWER = MERGED | {"hidden_size": VISION_WIDTH, "intermediate_size": 32}
WINDOWED = TOWER | {"fullatt_block_indexes": [0], "window_size": 16}
RESAMPLED = TOWER | {"num_position_embeddings": 16}
DEEPSTACK = RESAMPLED | {"deepstack_visual_indexes": [0]}
EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
SITES = {"text": ["model.language_model.embed_tokens"], "vision": ["model.visual.merger"]}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def build(model_class: type, config: Any) -> Any:
    """Build a tiny random model that never generates placeholders. Without a cache it would look for their images."""
    model = finish(model_class, config)
    model.generation_config.suppress_tokens = list(range(53, AUDIO_TOKEN + 1))
    return model


def image_rows() -> Batch:
    """Build rows with one image of 4 x 4 patches each, which are merged into 4 tokens."""
    batch = token_rows(1, 4, around=(57, 58)) | {
        "pixel_values": pixels(2 * 16, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    return batch | {"mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int()}


def with_sound(batch: Batch, tokens: int, around: tuple[int, int], **features: torch.Tensor) -> Batch:
    """Put a sound, as token ids, after the first token of every row."""
    batch = dict(batch)
    sound = torch.tensor([[around[0], *[AUDIO_TOKEN] * tokens, around[1]]] * 2)
    between = {"input_ids": sound, "attention_mask": torch.ones_like(sound), "labels": torch.full_like(sound, -100)}
    for key, inserted in between.items():
        batch[key] = torch.cat([batch[key][:, :1], inserted, batch[key][:, 1:]], dim=1)
    return batch | features


def known(config_class: type, **text: Any) -> Any:
    """Return the default configuration, with a merger that fits the language model. The defaults of some classes do
    not fit."""
    config = config_class()
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    return config


def _qwen(
    config_class: type, model_class: type, tower: dict[str, Any], known_text: dict[str, Any] | None = None, **text: Any
) -> Case:
    config = config_class(text_config=TEXT | text, vision_config=tower, **TOKENS)
    model = build(model_class, config)
    return Case(model, image_rows(), SITES, words(), known=lambda: known(config_class, **known_text or {}))


@architecture("qwen2_vl")
def qwen2_vl() -> Case:
    tower = MERGED | {"embed_dim": VISION_WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    case = _qwen(tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration, tower, **rope(ROPE))
    case.known = lambda: tf.Qwen2VLConfig(text_config=QWEN2_7B)
    return case


@architecture("qwen2_5_vl")
def qwen2_5_vl() -> Case:
    config = tf.Qwen2_5_VLConfig(text_config=TEXT | rope(ROPE), vision_config=WINDOWED, **TOKENS)
    case = Case(build(tf.Qwen2_5_VLForConditionalGeneration, config), image_rows(), SITES, words())
    case.known = lambda: tf.Qwen2_5_VLConfig(text_config=QWEN2_7B)
    return case


@architecture("qwen3_vl")
def qwen3_vl() -> Case:
    return _qwen(
        tf.Qwen3VLConfig,
        tf.Qwen3VLForConditionalGeneration,
        DEEPSTACK,
        {"hidden_size": 2560},
        head_dim=16,
        **rope(INTERLEAVED),
    )


@architecture("qwen3_vl_moe")
def qwen3_vl_moe() -> Case:
    return _qwen(
        tf.Qwen3VLMoeConfig,
        tf.Qwen3VLMoeForConditionalGeneration,
        DEEPSTACK,
        head_dim=16,
        **rope(INTERLEAVED),
        tie_word_embeddings=False,
        **EXPERTS,
    )


@architecture("qwen3_5")
def qwen3_5() -> Case:
    return _qwen(
        tf.Qwen3_5Config,
        tf.Qwen3_5ForConditionalGeneration,
        RESAMPLED,
        {"hidden_size": 5120},
        head_dim=16,
        **rope(HALF_OF_A_HEAD),
        **LINEAR,
    )


@architecture("qwen3_5_moe")
def qwen3_5_moe() -> Case:
    return _qwen(
        tf.Qwen3_5MoeConfig,
        tf.Qwen3_5MoeForConditionalGeneration,
        RESAMPLED,
        head_dim=16,
        **rope(HALF_OF_A_HEAD),
        **LINEAR,
        **EXPERTS,
    )


INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 32,
    "indexer_compress_ratio": 2,
}


@architecture("qwen4_exp")
def qwen4_exp() -> Case:
    """Build a Qwen4-Exp. Its n-gram table reads token ids, and CROME leaves it alone."""
    case = _qwen(
        tf.Qwen4ExpConfig,
        tf.Qwen4ExpForConditionalGeneration,
        RESAMPLED,
        head_dim=16,
        **rope(HALF_OF_A_HEAD),
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=64,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        **INDEXER,
        **LINEAR,
        **EXPERTS,
    )
    case.known = _known_qwen4_exp
    return case


def _known_qwen4_exp() -> Any:
    # The class's defaults leave out the indexer, which its attention layers need.
    config = tf.Qwen4ExpConfig(text_config=INDEXER | {"indexer_head_dim": 256})
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    return config


SOUND = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": VISION_WIDTH,
    "output_dim": WIDTH,
}


def _omni(
    config_class: type, model_class: type, tower: dict[str, Any], sound: dict[str, Any], frames: int, **text: Any
) -> Case:
    tokens = {"image_token_index": IMAGE_TOKEN, "video_token_index": 59, "audio_token_index": AUDIO_TOKEN}
    config = config_class(
        text_config=TEXT | text,
        vision_config=tower,
        audio_config=SOUND | sound,
        audio_start_token_id=55,
        audio_end_token_id=56,
        vision_start_token_id=57,
        **{
            key.replace("index", "id") if config_class is Qwen3OmniMoeThinkerConfig else key: i
            for key, i in tokens.items()
        },
    )
    batch = image_rows()
    del batch["mm_token_type_ids"]
    batch = with_sound(
        batch,
        tokens=2,
        around=(55, 56),
        input_features=pixels(2, 8, frames),
        feature_attention_mask=torch.ones(2, frames, dtype=torch.long),
    )
    model = build(model_class, config)
    flat = hasattr(model, "visual")  # transformers 4 has the towers beside the language model
    sites = {"text": ["model.embed_tokens"], "vision": ["visual.merger"]} if flat else dict(SITES)
    sites["audio"] = ["audio_tower.proj" if flat else "model.audio_tower.proj"]
    return Case(model, batch, sites, words())


@architecture("qwen2_5_omni_thinker")
def qwen2_5_omni_thinker() -> Case:
    return _omni(
        Qwen2_5OmniThinkerConfig,
        tf.Qwen2_5OmniThinkerForConditionalGeneration,
        WINDOWED,
        {},
        frames=8,
        **rope(ROPE),
        tie_word_embeddings=False,
    )


@architecture("qwen3_omni_moe_thinker")
def qwen3_omni_moe_thinker() -> Case:
    case = _omni(
        Qwen3OmniMoeThinkerConfig,
        tf.Qwen3OmniMoeThinkerForConditionalGeneration,
        DEEPSTACK,
        {"n_window_infer": 200, "downsample_hidden_size": 4},
        frames=12,
        **rope(INTERLEAVED),
        **EXPERTS,
    )
    case.sites["audio"] = [site + "2" for site in case.sites["audio"]]
    case.known = _known_qwen3_omni
    return case


def _known_qwen3_omni() -> Any:
    config = known(Qwen3OmniMoeThinkerConfig)
    config.audio_config.output_dim = config.text_config.hidden_size
    return config
