"""Idefics and SmolVLM: a connector, images as a list per row."""

from __future__ import annotations

import transformers as tf

from .case import IMAGE_SIZE, IMAGE_TOKEN, TEXT, VISION, Case, architecture, finish, pixels, token_rows, words


def _idefics3_like(config_class: type, model_class: type) -> Case:
    config = config_class(
        vision_config=VISION, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN, scale_factor=2
    )
    batch = token_rows(1, 1) | {"pixel_values": pixels(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.text_model.embed_tokens"], "vision": ["model.connector"]}
    return Case(finish(model_class, config), batch, sites, words())


@architecture("idefics3")
def idefics3() -> Case:
    return _idefics3_like(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)


@architecture("smolvlm")
def smolvlm() -> Case:
    return _idefics3_like(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)
