"""Builders of Gemma and PaliGemma hosts. They have scaled embedding tables, attend to images in both directions, and
some have per-layer embedding tables."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .case import (
    AUDIO_TOKEN,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PATCH,
    TEXT,
    VISION,
    VOCABULARY,
    WIDTH,
    Batch,
    Case,
    architecture,
    finish,
    pixels,
    token_rows,
    words,
)

PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
GEMMA4_TEXT = TEXT | {"head_dim": 16, "global_head_dim": 16, "sliding_window": 16}
GEMMA4_VISION: dict[str, Any] = {key: value for key, value in VISION.items() if key != "image_size"} | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 8,
}
GEMMA4_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "audio_token_id": AUDIO_TOKEN,
    "video_token_id": 59,
    "boi_token_id": 57,
    "eoi_token_id": 58,
    "boa_token_id": 55,
    "eoa_token_index": 56,
}
SITES = {
    "text": ["model.language_model.embed_tokens"],
    "vision": ["model.embed_vision"],
    "audio": ["model.embed_audio"],
}


def positions(side: int) -> torch.Tensor:
    """Return the (x, y) positions of the patches of two square images."""
    xy = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1)
    return xy.reshape(1, -1, 2).expand(2, -1, -1).contiguous()


def image_and_sound(image_tokens: int, audio_tokens: int) -> Batch:
    """Build two rows, each with one image, one sound and two words."""
    image, sound = [IMAGE_TOKEN] * image_tokens, [AUDIO_TOKEN] * audio_tokens
    ids = torch.tensor([[1, 57, *image, 58, 55, *sound, 56, 5, 6], [1, 57, *image, 58, 55, *sound, 56, 7, 8]])
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@architecture("shieldgemma2")
def shieldgemma2() -> Case:
    """Build a ShieldGemma 2. It is Gemma 3's class under another `model_type`, which the image-text-to-text
    mapping lists."""
    return gemma3()


@architecture("gemma3")
def gemma3() -> Case:
    config = tf.Gemma3Config(
        text_config=TEXT | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
        vision_config=tf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=57,
        eoi_token_index=58,
    )
    batch = token_rows(1, 4, around=(57, 58)) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Case(finish(tf.Gemma3ForConditionalGeneration, config), batch, sites, words(), scaled_table=True)


@architecture("paligemma")
def paligemma() -> Case:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.GemmaConfig(**TEXT, head_dim=16),
        image_token_index=IMAGE_TOKEN,
        projection_dim=WIDTH,
    )
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["token_type_ids"] = (batch["labels"] != -100).int()
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    model = finish(tf.PaliGemmaForConditionalGeneration, config)
    return Case(model, batch, sites, words(), scaled_table=True)


def _gemma4_batch() -> Batch:
    batch = image_and_sound(4, 2)
    batch |= {"pixel_values": pixels(2, 16, 3 * PATCH * PATCH), "image_position_ids": positions(4)}
    batch |= {"input_features": pixels(2, 8, 8), "input_features_mask": torch.ones(2, 8, dtype=torch.bool)}
    return batch | {"mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int()}


@architecture("gemma4")
def gemma4() -> Case:
    """Build a Gemma 4. It has a per-layer embedding table, which CROME leaves alone."""
    config = tf.Gemma4Config(
        text_config=GEMMA4_TEXT | PER_LAYER,
        vision_config=GEMMA4_VISION,
        audio_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [8, 4],
            "attention_chunk_size": 2,
            "attention_context_left": 3,
            "output_proj_dims": 24,
        },
        **GEMMA4_TOKENS,
    )
    model = finish(tf.Gemma4ForConditionalGeneration, config)
    return Case(model, _gemma4_batch(), SITES, words(), scaled_table=True, known=_gemma4_e2b)


def _gemma4_e2b() -> tf.Gemma4Config:
    return tf.Gemma4Config(text_config={"hidden_size": 1536}, vision_config={}, audio_config={})


@architecture("gemma4_unified")
def gemma4_unified() -> Case:
    """Build a Gemma 4 Unified. It has no towers, and patches and waveforms each go through one projection."""
    config = tf.Gemma4UnifiedConfig(
        text_config=GEMMA4_TEXT,
        vision_config={
            "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH,
            "mm_posemb_size": 8,
        },
        audio_config={"audio_embed_dim": 8},
        **GEMMA4_TOKENS,
    )  # fmt: skip
    batch = image_and_sound(4, 2)
    batch |= {"pixel_values": pixels(2, 4, 3 * 4 * 4), "image_position_ids": positions(2)}
    batch |= {"input_features": pixels(2, 2, 8), "input_features_mask": torch.ones(2, 2, dtype=torch.bool)}
    batch |= {"mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int()}
    model = finish(tf.Gemma4UnifiedForConditionalGeneration, config)
    return Case(model, batch, SITES, words(), scaled_table=True, known=_gemma4_12b)


def _gemma4_12b() -> tf.Gemma4UnifiedConfig:
    return tf.Gemma4UnifiedConfig(text_config={"hidden_size": 3840}, vision_config={}, audio_config={})


@architecture("t5gemma2")
def t5gemma2() -> Case:
    """Build a T5Gemma 2. Its two scaled embedding modules share one table and keep the end-of-image token's row
    outside it."""
    text = TEXT | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}
    encoder = {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}
    encoder |= {"image_token_index": IMAGE_TOKEN, "boi_token_index": 57, "eoi_token_index": 58}
    config = tf.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=IMAGE_TOKEN)
    batch = token_rows(1, 4, around=(57, 58)) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["labels"] = torch.tensor([[5, 6, 2], [7, 8, 2]])
    sites = {
        "text": ["model.encoder.text_model.embed_tokens", "model.decoder.embed_tokens"],
        "vision": ["model.encoder.multi_modal_projector"],
    }
    text_only = words() | {"decoder_input_ids": torch.tensor([[1, 5, 6]])}
    model = finish(tf.T5Gemma2ForConditionalGeneration, config)
    model.model.encoder.text_model.embed_tokens.eoi_embedding.data.copy_(pixels(WIDTH))  # starts as zeros
    case = Case(model, batch, sites, text_only, scaled_table=True, known=_t5gemma2_270m)
    case.not_applicable["fold"] = "one token's embedding is not in the table"
    return case


def _t5gemma2_270m() -> tf.T5Gemma2Config:
    width = {"hidden_size": 640, "num_attention_heads": 4}
    return tf.T5Gemma2Config(encoder={"text_config": width}, decoder=width)


class FeatureMap(tf.PreTrainedModel):
    """Stand-in for Gemma 3n's tower from timm (see `llava.py`). It returns a map of features without pooling."""

    config_class = tf.Gemma3nConfig.sub_configs["vision_config"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.conv = torch.nn.Conv2d(3, config.hidden_size, kernel_size=PATCH, stride=PATCH)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, do_pooling: bool, **_: Any) -> BaseModelOutputWithPooling:
        assert not do_pooling
        return BaseModelOutputWithPooling(last_hidden_state=self.conv(pixel_values))


tf.AutoModel.register(FeatureMap.config_class, FeatureMap, exist_ok=True)


@architecture("gemma3n")
def gemma3n() -> Case:
    """Build a Gemma 3n. Its projectors also embed the token ids of their own vocabularies, so they run more than once
    per forward pass."""
    config = tf.Gemma3nConfig(
        text_config=TEXT | PER_LAYER | {
            "head_dim": 16, "sliding_window": 16, "laurel_rank": 4, "altup_num_inputs": 2, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={"hidden_size": VISION["hidden_size"], "vocab_offset": 56, "vocab_size": 5},
        audio_config={
            "hidden_size": 16, "vocab_offset": 61, "vocab_size": 3, "input_feat_size": 8, "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2, "conf_attention_chunk_size": 2, "conf_attention_context_left": 3,
            "conf_reduction_factor": 1, "sscp_conv_channel_size": [8, 4],
        },
        image_token_id=IMAGE_TOKEN, audio_token_id=AUDIO_TOKEN, vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=3, boi_token_id=57, eoi_token_id=58, boa_token_id=55, eoa_token_id=62,
    )  # fmt: skip
    batch = image_and_sound(4, 3) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch |= {"input_features": pixels(2, 8, 8), "input_features_mask": torch.ones(2, 8, dtype=torch.bool)}
    model = finish(tf.Gemma3nForConditionalGeneration, config)
    model.generation_config.suppress_tokens = list(range(53, VOCABULARY))
    case = Case(model, batch, SITES, words(), scaled_table=True)
    case.not_applicable["mixed batch"] = "one embedding pads the sound of all rows"
    return case


@architecture("diffusion_gemma")
def diffusion_gemma() -> Case:
    """Build a DiffusionGemma. Its decoder embeds the canvas of tokens that it denoises, and its encoder embeds the
    prompt with the same table."""
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    config = tf.DiffusionGemmaConfig(
        text_config=GEMMA4_TEXT | {"num_global_key_value_heads": 2} | experts,
        vision_config=GEMMA4_VISION | {"model_type": "gemma4_vision"},
        image_token_id=IMAGE_TOKEN, boi_token_id=57, eoi_token_id=58, canvas_length=4,
    )  # fmt: skip
    rows = token_rows(1, 4, around=(57, 58))
    batch = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    batch |= {"pixel_values": pixels(2, 16, 3 * PATCH * PATCH), "image_position_ids": positions(4)}
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    batch |= {"decoder_input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    batch |= {"self_conditioning_logits": pixels(2, 4, VOCABULARY)}
    sites = {
        "text": ["model.encoder.language_model.embed_tokens", "model.decoder.embed_tokens"],
        "vision": ["model.encoder.embed_vision"],
    }
    text_only = words() | {"decoder_input_ids": torch.tensor([[5, 6, 7, 8]])}
    case = Case(finish(tf.DiffusionGemmaForBlockDiffusion, config), batch, sites, text_only, scaled_table=True)
    case.not_applicable["generate"] = "denoises by a sampler of its own, not token by token"
    case.not_applicable["fold"] = "also averages the table's rows, for self-conditioning"
    case.known = _diffusion_gemma_26b
    return case


def _diffusion_gemma_26b() -> tf.DiffusionGemmaConfig:
    experts = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    return tf.DiffusionGemmaConfig(text_config={"hidden_size": 2816} | experts, vision_config={})
