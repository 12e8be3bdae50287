"""Hosts with a projector between a tower and a language model: LLaVA and its kin."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .case import IMAGE_SIZE, IMAGE_TOKEN, PATCH, TEXT, VISION, Case, architecture, finish, pixels, token_rows, words


@architecture("llava")
def llava(vision: dict[str, Any] | None = None, **text: Any) -> Case:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION | (vision or {})),
        text_config=tf.LlamaConfig(**TEXT | text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Case(finish(tf.LlavaForConditionalGeneration, config), batch, sites, words())


@architecture("llava_next")
def llava_next() -> Case:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
    )
    # base image 4 tokens + one tile of 2 x 2, with a newline after each of its two rows
    batch = token_rows(1, 10) | {
        "pixel_values": pixels(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2),
    }
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Case(finish(tf.LlavaNextForConditionalGeneration, config), batch, sites, words())


@architecture("internvl")
def internvl() -> Case:
    config = tf.InternVLConfig(
        vision_config=VISION | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH] * 2},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=1,
        vision_feature_layer=-1,
    )
    batch = token_rows(1, 1) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Case(finish(tf.InternVLForConditionalGeneration, config), batch, sites, words())
