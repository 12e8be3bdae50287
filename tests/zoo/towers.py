"""Builders of more hosts whose vision tower ends in a merger: GLM, Ernie, Exaone and others."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .case import (
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    PATCH,
    TEXT,
    VISION,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    Batch,
    Case,
    architecture,
    pixels,
    rope,
    token_rows,
    words,
)
from .qwen import (
    DEEPSTACK,
    INTERLEAVED,
    ROPE,
    SITES,
    TOKENS,
    TOWER,
    WINDOWED,
    build,
    image_rows,
    known,
    with_sound,
)

GLM_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 59,
    "image_start_token_id": 57,
    "image_end_token_id": 58,
    "video_start_token_id": 53,
    "video_end_token_id": 54,
}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
HALF = ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16, "head_dim": 16}
INDEXER = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}


def still_images() -> Batch:
    """Build the rows of `image_rows` for a tower without a time axis."""
    return image_rows() | {"pixel_values": pixels(2 * 16, 3 * PATCH * PATCH)}


def without_types(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "mm_token_type_ids"}


def sites(vision: str, audio: str | None = None) -> dict[str, list[str]]:
    found = {"text": ["model.language_model.embed_tokens"], "vision": [vision]}
    return found | {"audio": [audio]} if audio else found


def _glm(config_class: type, model_class: type, *, known_text: dict[str, Any] | None = None, **text: Any) -> Case:
    tower = TOWER | {"image_size": 4 * PATCH, "projection_intermediate_size": 24}
    config = config_class(text_config=TEXT | rope(ROPE) | text, vision_config=tower, **GLM_TOKENS)
    model = build(model_class, config)
    return Case(model, image_rows(), SITES, words(), known=lambda: known(config_class, **known_text or {}))


@architecture("glm4v")
def glm4v() -> Case:
    return _glm(tf.Glm4vConfig, tf.Glm4vForConditionalGeneration)


@architecture("glm4v_moe")
def glm4v_moe() -> Case:
    return _glm(tf.Glm4vMoeConfig, tf.Glm4vMoeForConditionalGeneration, **rope(HALF), **EXPERTS)


@architecture("glm46v")
def glm46v() -> Case:
    return _glm(tf.Glm46VConfig, tf.Glm46VForConditionalGeneration)


@architecture("glmga")
def glmga() -> Case:
    return _glm(tf.GlmgaConfig, tf.Glm46VForConditionalGeneration)


@architecture("glm_ocr")
def glm_ocr() -> Case:
    return _glm(tf.GlmOcrConfig, tf.GlmOcrForConditionalGeneration, known_text={"hidden_size": 1536})


@architecture("glm5_next")
def glm5_next() -> Case:
    return _glm(
        tf.Glm5NextConfig,
        tf.Glm5NextForConditionalGeneration,
        rope_parameters=None,
        qk_nope_head_dim=16,
        layer_types=["linear_attention", "indexed_attention"],
        mlp_layer_types=["dense", "sparse"],
        indexer_types=["full", "full"],
        index_kpool=2,
        linear_head_dim=8,
        linear_num_heads=2,
        hc_mult=2,
        hc_sinkhorn_iters=2,
        **LATENT | INDEXER | EXPERTS,
    )


@architecture("cohere_compass")
def cohere_compass() -> Case:
    text = TEXT | {"rope_parameters": {"full_attention": INTERLEAVED}, "layer_types": ["full_attention"] * 2}
    config = tf.CohereCompassConfig(text_config=text, vision_config=DEEPSTACK, tie_word_embeddings=True, **TOKENS)
    model = build(tf.CohereCompassForConditionalGeneration, config)
    # The class's defaults have no rope parameters for the only kind of layer that they name.
    full = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    case = Case(model, image_rows(), SITES, words())
    case.known = lambda: known(tf.CohereCompassConfig, rope_parameters=full)
    return case


@architecture("cosmos3_omni")
def cosmos3_omni() -> Case:
    """Build the reasoner of a Cosmos 3 Omni. The class holds only this part, which is a Qwen3-VL without sound."""
    text = TEXT | {"model_type": "qwen3_vl_text", "head_dim": 16} | rope(INTERLEAVED)
    config = tf.Cosmos3OmniConfig(text_config=text, vision_config=dict(DEEPSTACK), **TOKENS)
    model = build(tf.Cosmos3OmniForConditionalGeneration, config)
    return Case(model, image_rows(), SITES, words(), known=lambda: known(tf.Cosmos3OmniConfig))


@architecture("cosmos3_edge")
def cosmos3_edge() -> Case:
    config = tf.Cosmos3EdgeConfig(
        text_config=TEXT | {"head_dim": 16} | rope(ROPE),
        vision_config=VISION | {"num_patches": 16, "spatial_merge_size": 2},
        projector_hidden_size=24,
        **TOKENS,
    )
    model = build(tf.Cosmos3EdgeForConditionalGeneration, config)
    return Case(model, still_images(), sites("model.projector"), words())


@architecture("exaone4_5")
def exaone4_5() -> Case:
    config = tf.Exaone4_5_Config(
        text_config=TEXT | {"model_type": "exaone4", "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=WINDOWED | {"num_key_value_heads": 1},
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
    )
    model = build(tf.Exaone4_5_ForConditionalGeneration, config)
    case = Case(model, without_types(image_rows()), SITES, words())
    case.known = lambda: known(tf.Exaone4_5_Config, hidden_size=5120)
    return case


@architecture("ernie4_5_vl_moe")
def ernie4_5_vl_moe() -> Case:
    """Build an Ernie 4.5 VL. It routes image tokens, and the two tokens around them, to experts of their own."""
    config = tf.Ernie4_5_VLMoeConfig(
        text_config=TEXT
        | {
            "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [16, 16],
            "moe_num_experts": 4,
            "moe_k": 2,
        },
        vision_config={key: TOWER[key] for key in ("depth", "num_heads", "patch_size", "hidden_size")}
        | {"intermediate_size": 32},
        **GLM_TOKENS,
    )
    batch = still_images()
    batch["moe_mm_token_type_ids"] = ((batch["input_ids"] >= 57) & (batch["input_ids"] <= IMAGE_TOKEN)).int()
    model = build(tf.Ernie4_5_VLMoeForConditionalGeneration, config)
    case = Case(model, batch, sites("model.resampler_model"), words())
    case.not_applicable["no cache"] = "generate() without a cache does not extend moe_mm_token_type_ids"
    return case


@architecture("paddleocr_vl")
def paddleocr_vl() -> Case:
    config = tf.PaddleOCRVLConfig(
        text_config=TEXT | {"head_dim": 16} | rope(ROPE),
        vision_config=VISION | {"image_size": 4 * PATCH},
        **TOKENS,
    )
    batch = image_rows() | {"pixel_values": pixels(2 * 16, 3, PATCH, PATCH)}
    model = build(tf.PaddleOCRVLForConditionalGeneration, config)
    return Case(model, batch, sites("model.projector"), words())


@architecture("hunyuan_vl")
def hunyuan_vl() -> Case:
    """Build a HunYuan-VL. Its merger learns an image's newline, start and end, which take image tokens."""
    config = tf.HunYuanVLConfig(
        text_config=TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}},
        vision_config=VISION | {"max_image_size": 4 * PATCH},
        image_token_id=IMAGE_TOKEN,
        im_start_id=57,
        im_end_id=58,
        im_newline_id=56,
    )
    batch = token_rows(1, 2 * (2 + 1) + 2, around=(57, 58)) | {
        "pixel_values": pixels(2 * 16, 3 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    model = build(tf.HunYuanVLForConditionalGeneration, config)
    # Its newline, start and end are vectors, which `finish` leaves at what torch.empty held.
    for parameter in model.model.vision_tower.patch_merger.parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 0.5)
    case = Case(model, batch, sites("model.vision_tower.patch_merger"), words())
    case.known = lambda: tf.HunYuanVLConfig(
        text_config={
            "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128,
        }
    )  # fmt: skip
    return case


@architecture("video_llama_3")
def video_llama_3() -> Case:
    config = tf.VideoLlama3Config(
        text_config=TEXT | {"model_type": "qwen2"}, vision_config=VISION, image_token_id=IMAGE_TOKEN, video_token_id=59
    )
    batch = without_types(still_images()) | {"image_merge_sizes": torch.tensor([2, 2])}
    model = build(tf.VideoLlama3ForConditionalGeneration, config)
    return Case(model, batch, sites("model.projector"), words())


@architecture("dots3_note")
def dots3_note() -> Case:
    sliding = {
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
        "qk_nope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    config = tf.Dots3NoteConfig(
        text_config=TEXT
        | {
            "layer_types": ["indexed_attention", "sliding_attention"],
            "sliding_window": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "shared_experts_intermediate_size": 16,
        }
        | {f"swa_{key}": value for key, value in sliding.items()}
        | LATENT | INDEXER | EXPERTS,
        vision_config=VISION
        | {
            "adapter_in_dim": VISION_WIDTH, "adapter_out_dim": WIDTH, "mlp_layer_types": ["dense", "sparse"],
            "moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        },
        audio_config={
            "hidden_size": VISION_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "feature_size": 8, "hop_length": 1, "downsample_hidden_size": 4, "adapter_input_size": VISION_WIDTH,
            "adapter_out_dim": WIDTH,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
        audio_token_id=AUDIO_TOKEN,
    )  # fmt: skip
    batch = with_sound(
        without_types(still_images()),
        tokens=2,
        around=(55, 56),
        input_features=pixels(2, 8, 16),
        chunk_sample_lengths=torch.tensor([16, 16]),
    )
    model = build(tf.Dots3NoteForConditionalGeneration, config)
    return Case(model, batch, sites("model.vision_tower.merger", "model.audio_tower.adapter"), words())


NORMALIZED = "its token embedding normalizes every row it looks up, so no table holds what the adapter adds"
MUSE_TEXT = TEXT | {"head_dim": 16, "sliding_window": 16}
MUSE_TOWER = VISION | {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
MUSE = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 59,
    "out_hidden_size": 4 * VISION_WIDTH,
    "projector_hidden_size": 24,
}


@architecture("muse_glimmer")
def muse_glimmer() -> Case:
    config = tf.MuseGlimmerConfig(text_config=MUSE_TEXT, vision_config=MUSE_TOWER, **MUSE)
    case = Case(
        build(tf.MuseGlimmerForConditionalGeneration, config),
        without_types(image_rows()),
        sites("model.perception_emb_norm"),
        words(),
    )
    case.not_applicable["fold"] = NORMALIZED
    return case


@architecture("muse_spark")
def muse_spark() -> Case:
    """Build a Muse Spark. The token embedding's own norm processes a sound after the last module that can
    be wrapped."""
    config = tf.MuseSparkConfig(
        text_config=MUSE_TEXT
        | {
            "mlp_layer_types": ["dense", "sparse"], "moe_hidden_size": 16, "moe_intermediate_size": 16,
            "num_local_experts": 4, "num_experts_per_tok": 2,
        },
        vision_config=MUSE_TOWER,
        audio_config={
            "patch_sizes": [2, 2], "hidden_sizes": [8, VISION_WIDTH], "depths": [1, 1], "num_hidden_layers": 2,
            "conv_kernel_size": 3, "out_hidden_size": WIDTH,
        },
        audio_token_id=AUDIO_TOKEN,
        **MUSE,
    )  # fmt: skip
    batch = with_sound(without_types(image_rows()), tokens=2, around=(55, 56), input_values=pixels(2, 8))
    case = Case(
        build(tf.MuseSparkForConditionalGeneration, config),
        batch,
        sites("model.perception_emb_norm", "model.audio_tower.post_proj_norm"),
        words(),
    )
    case.not_applicable["fold"] = NORMALIZED
    return case


INKLING_TEXT = (
    TEXT
    | EXPERTS
    | {
        "head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 16,
        "d_rel": 4,
        "rel_extent": 32,
        "layer_types": ["hybrid_sliding", "hybrid"],
    }
)


@architecture("inkling_mm_model")
def inkling_mm_model() -> Case:
    """Build an Inkling. It folds each patch step by step into one token, and it adds up embedded mel bins for
    a sound."""
    config = tf.InklingConfig(
        text_config=INKLING_TEXT
        | {"mlp_layer_types": ["dense", "sparse"], "n_shared_experts": 1, "logits_mup_width_multiplier": 1.0},
        vision_config={"patch_size": PATCH, "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 16},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE_TOKEN,
        audio_token_id=AUDIO_TOKEN,
        image_bos_token_id=57,
        audio_bos_token_id=55,
    )
    batch = token_rows(1, 2, around=(57, 58)) | {"pixel_values": pixels(2 * 2, 2, PATCH, PATCH, 3)}
    mel = torch.randint(8, (2, 2, 4), generator=torch.Generator().manual_seed(4))
    batch = with_sound(batch, tokens=2, around=(55, 56), audio_input_ids=mel)
    case = Case(
        build(tf.InklingForConditionalGeneration, config),
        batch,
        sites("model.vision_tower.final_norm", "model.audio_tower.norm"),
        words(),
    )
    case.not_applicable["fold"] = NORMALIZED
    return case


@architecture("inkling2")
def inkling2() -> Case:
    config = tf.Inkling2Config(
        text_config=INKLING_TEXT | {"unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 1},
        vision_config=VISION | {"posemb_grid_size": 4, "projection_hidden_dim": 24, "text_hidden_size": WIDTH},
        image_token_id=IMAGE_TOKEN,
    )
    batch = token_rows(1, 4, around=(57, 58)) | {
        "pixel_values": pixels(2 * 4, 2 * PATCH, 2 * PATCH, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),  # counted in tokens, not patches
    }
    model = build(tf.Inkling2ForConditionalGeneration, config)
    case = Case(model, batch, sites("model.vision_tower.merger"), words())
    case.not_applicable["fold"] = NORMALIZED
    case.not_applicable["bfloat16"] = "model.to(bfloat16) also casts its router, which must stay in float32"
    return case
