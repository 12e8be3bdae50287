"""Builders of Idefics3, SmolVLM and Granite Docling, which have a connector and take a list of images per row."""

from __future__ import annotations

import torch
import transformers as tf

from .case import IMAGE_SIZE, IMAGE_TOKEN, TEXT, VISION, WIDTH, Case, architecture, finish, pixels, token_rows, words


def _idefics3_like(config_class: type, model_class: type) -> Case:
    """Build an Idefics3 or a SmolVLM. An image has four tokens, because SmolVLM of transformers 5.20 requires a
    multiple of the patch size."""
    size = 2 * IMAGE_SIZE
    vision = VISION | {"image_size": size}
    config = config_class(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN, scale_factor=2
    )
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 1, 3, size, size)}
    sites = {"text": ["model.text_model.embed_tokens"], "vision": ["model.connector"]}
    model = finish(model_class, config)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]  # transformers 4 would look for its image
    return Case(model, batch, sites, words())


@architecture("idefics3")
def idefics3() -> Case:
    return _idefics3_like(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)


@architecture("smolvlm")
def smolvlm() -> Case:
    return _idefics3_like(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)


@architecture("granite_docling")
def granite_docling() -> Case:
    """Build a Granite Docling. Its tower's connector also returns deepstack features, which CROME leaves unchanged."""
    text = TEXT | {"embedding_multiplier": 1.0}
    vision = VISION | {"out_hidden_size": WIDTH, "scale_factor": 2, "deepstack_visual_indexes": [0]}
    config = tf.GraniteDoclingConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    batch = token_rows(1, 1) | {"pixel_values": pixels(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["pixel_attention_mask"] = torch.ones(2, 1, dtype=torch.bool)
    sites = {"text": ["model.text_model.embed_tokens"], "vision": ["model.vision_model.connector"]}
    return Case(finish(tf.GraniteDoclingForConditionalGeneration, config), batch, sites, words())
