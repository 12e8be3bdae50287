"""Gemma and PaliGemma: scaled embedding tables, images attended in both directions."""

from __future__ import annotations

import transformers as tf

from .case import IMAGE_SIZE, IMAGE_TOKEN, TEXT, VISION, WIDTH, Case, architecture, finish, pixels, token_rows, words


@architecture("shieldgemma2")
def shieldgemma2() -> Case:
    """Gemma 3's class under another model_type, as the image-text-to-text mapping has it."""
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
