"""Builders of document readers and small models: DeepSeek-OCR, MiniCPM, Granite, Ovis and others."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .case import (
    IMAGE_SIZE,
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
    finish,
    pixels,
    token_rows,
    words,
)
from .qwen import HALF_OF_A_HEAD, LINEAR


@architecture("idefics2")
def idefics2() -> Case:
    resampler = {
        "hidden_size": WIDTH, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    config = tf.Idefics2Config(
        vision_config=VISION,
        perceiver_config=resampler,
        text_config=tf.MistralConfig(**TEXT, head_dim=16),
        image_token_id=IMAGE_TOKEN,
    )
    batch = token_rows(1, 3) | {"pixel_values": pixels(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.text_model.embed_tokens"], "vision": ["model.connector"]}
    return Case(finish(tf.Idefics2ForConditionalGeneration, config), batch, sites, words())


@architecture("ovis2")
def ovis2() -> Case:
    """Build an Ovis2. It mixes rows of a visual table into image embeddings, and frames each image with other rows of
    that table."""
    config = tf.Ovis2Config(
        vision_config=VISION | {"vocab_size": 24},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        visual_indicator_token_ids=[53, 54, 55, 56, 57],
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
    )
    model = finish(tf.Ovis2ForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [*range(53, 58), IMAGE_TOKEN]
    batch = token_rows(1, 4, around=(53, 57)) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.visual_embeddings_table"]}
    known = {"hidden_size": 1536, "vocab_size": 151643}  # the class's defaults leave Qwen2's width in the text part
    case = Case(model, batch, sites, words(), known=lambda: tf.Ovis2Config(text_config=known))
    case.not_applicable["mixed batch"] = "the embeddings that frame an image are one for all rows"
    return case


@architecture("janus")
def janus() -> Case:
    """Build a Janus. Its second tower serves the generation of images, and CROME leaves it alone."""
    vision = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    config = tf.JanusConfig(
        vision_config=vision | {"mlp_ratio": 2, "projection_dim": WIDTH, "num_image_tokens": 4},
        text_config=tf.LlamaConfig(**TEXT),
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH,
        },
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    model = finish(tf.JanusForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.aligner"]}
    # The class's defaults leave Llama's width in the text part.
    return Case(model, batch, sites, words(), known=lambda: tf.JanusConfig(text_config={"hidden_size": 2048}))


KOSMOS_TEXT = {
    "vocab_size": VOCABULARY, "embed_dim": WIDTH, "layers": 2, "ffn_dim": 64, "attention_heads": 2, "dropout": 0.0,
    "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _kosmos(model_class: type, config: Any, image: Batch) -> Case:
    """Build a Kosmos. A mask gives the image's positions, and its projection returns a tuple."""
    batch = token_rows(1, 3, around=(57, 58)) | image
    batch["image_embeds_position_mask"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    text_only = words()
    text_only["image_embeds_position_mask"] = torch.zeros_like(text_only["input_ids"])
    text_only["image_embeds"] = torch.zeros(1, 0, WIDTH)  # Kosmos-2 wants some, if only none
    sites = {"text": ["text_model.model.embed_tokens"], "vision": ["image_to_text_projection"]}
    return Case(finish(model_class, config), batch, sites, text_only)


@architecture("kosmos-2")
def kosmos2() -> Case:
    config = tf.Kosmos2Config(text_config=KOSMOS_TEXT, vision_config=VISION, latent_query_num=3)
    image = {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    return _kosmos(tf.Kosmos2ForConditionalGeneration, config, image)


@architecture("kosmos-2.5")
def kosmos2_5() -> Case:
    vision = {
        "hidden_size": VISION_WIDTH, "patch_embed_hidden_size": 12, "intermediate_size": 32, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_num_patches": 4,
    }  # fmt: skip
    config = tf.Kosmos2_5Config(text_config=KOSMOS_TEXT, vision_config=vision, latent_query_num=3)
    # The first two numbers of a patch are its row and column.
    place = torch.tensor([[[1.0, 1], [1, 2], [2, 1], [2, 2]]] * 2)
    image = {"flattened_patches": torch.cat([place, pixels(2, 4, 12)], dim=-1)}
    return _kosmos(tf.Kosmos2_5ForConditionalGeneration, config, image)


def _minicpm(config_class: type, model_class: type, known_width: int, **options: Any) -> Case:
    """Build a MiniCPM. It packs images of any size into one row, and its merger returns a list."""
    text = TEXT | {"head_dim": 16, "rope_parameters": HALF_OF_A_HEAD} | LINEAR
    config = config_class(
        text_config=text | {"model_type": "qwen3_5_text"},
        vision_config=VISION | {"image_size": 8 * PATCH},
        insert_layer_id=0,
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
        downsample_mode="16x",
        **options,
    )
    batch = token_rows(1, 2, around=(57, 58))
    batch |= {"pixel_values": pixels(1, 3, PATCH, PATCH * 2 * 4 * 8), "target_sizes": torch.tensor([[4, 8]] * 2)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.merger"]}
    model = finish(model_class, config)
    model.generation_config.suppress_tokens = list(range(53, IMAGE_TOKEN + 1))
    known = {"model_type": "qwen3_5_text", "hidden_size": known_width}
    return Case(model, batch, sites, words(), known=lambda: config_class(text_config=known))


@architecture("minicpmv4_6")
def minicpmv4_6() -> Case:
    return _minicpm(tf.MiniCPMV4_6Config, tf.MiniCPMV4_6ForConditionalGeneration, 1024)


@architecture("minicpmv4_7")
def minicpmv4_7() -> Case:
    """Build a MiniCPM-V 4.7. It derives positions on a canvas from the tokens around the image."""
    markers = {"image_start_id": 57, "image_end_id": 58, "slice_start_id": 55, "slice_end_id": 56, "newline_id": 54}
    case = _minicpm(tf.MiniCPMV4_7Config, tf.MiniCPMV4_7ForConditionalGeneration, 1024, **markers)
    case.batch["mm_token_type_ids"] = (case.batch["input_ids"] == IMAGE_TOKEN).int()
    return case


@architecture("minicpm_ocr")
def minicpm_ocr() -> Case:
    return _minicpm(tf.MiniCPMOcrConfig, tf.MiniCPMOcrForConditionalGeneration, 1024)


@architecture("molmo2")
def molmo2() -> Case:
    """Build a Molmo2. It adds the image to the embeddings of its placeholders, and each token pools the patches that
    the processor lists."""
    config = tf.Molmo2Config(
        text_config=TEXT | {"head_dim": 16, "additional_vocab_size": 2},
        vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 8, "image_size": [IMAGE_SIZE, IMAGE_SIZE]},
        adapter_config={
            "vision_feature_layer": [1, 0], "hidden_size": VISION_WIDTH, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "text_hidden_size": WIDTH,
        },
        image_patch_id=IMAGE_TOKEN, image_start_token_id=57, image_end_token_id=58,
        low_res_image_start_token_id=56, frame_start_token_id=54, frame_end_token_id=55,
    )  # fmt: skip
    batch = token_rows(1, 2, around=(57, 58)) | {
        "pixel_values": pixels(2, 4, 3 * PATCH * PATCH),
        "image_token_pooling": torch.tensor([[0, 1], [2, 3], [4, 5], [6, -1]]),
        "image_grids": torch.tensor([[1, 2, 0, 0]] * 2),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    model = finish(tf.Molmo2ForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    text_only = words()
    text_only["mm_token_type_ids"] = torch.zeros_like(text_only["input_ids"])
    known = {"text_hidden_size": 4096}  # Molmo2-8B's; the class's default fits another language model
    return Case(model, batch, sites, text_only, known=lambda: tf.Molmo2Config(adapter_config=known))


@architecture("granite4_vision")
def granite4_vision() -> Case:
    """Build a Granite 4 Vision. Images reach it only through projectors of several layers, whose outputs are added
    inside the language model."""
    config = tf.Granite4VisionConfig(
        text_config=TEXT | {"num_hidden_layers": 5, "embedding_multiplier": 2.0},
        vision_config=VISION | {"model_type": "siglip_vision_model", "hidden_size": 64},
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32,
            "cross_attention_frequency": 1, "use_qformer_text_input": False, "hidden_size": 64,
            "encoder_hidden_size": 64, "num_attention_heads": 4,
        },
        image_token_index=IMAGE_TOKEN, image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        vision_feature_select_strategy="full", downsample_rate="1/2",
        deepstack_layer_map=[[1, 0]], spatial_target_layers=[1, 2, 3, 4],
    )  # fmt: skip
    batch = token_rows(1, 3) | {"pixel_values": pixels(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["image_sizes"] = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2)
    projectors = ["layerwise_projectors.0", *(f"spatial_projectors.{i}" for i in range(4))]
    sites = {
        "text": ["model.language_model.embed_tokens"],
        "vision": [f"model.{projector}.out_linear" for projector in projectors],
    }
    model = finish(tf.Granite4VisionForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    return Case(model, batch, sites, words(), known=_granite4_vision_2b)


def _granite4_vision_2b() -> tf.Granite4VisionConfig:
    return tf.Granite4VisionConfig(
        text_config={"hidden_size": 2048},
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384},
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 9]],
    )


OCR_TEXT = TEXT | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1,
}  # fmt: skip
SAM = {
    "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 4, "mlp_dim": 16, "window_size": 4, "global_attn_indexes": [0],
}  # fmt: skip


@architecture("deepseek_ocr2")
def deepseek_ocr2() -> Case:
    """Build a DeepSeek-OCR 2. Its 144 learned queries read the image, and crops go through the same projector in a
    second call."""
    encoder = TEXT | {"hidden_size": VISION_WIDTH, "intermediate_size": 32}
    sam = SAM | {"downsample_channels": [12, VISION_WIDTH]}
    config = tf.DeepseekOcr2Config(
        text_config=OCR_TEXT, vision_config={"sam_config": sam, "encoder_config": encoder}, image_token_id=IMAGE_TOKEN
    )
    batch = token_rows(1, 2 * 144 + 1) | {"pixel_values": pixels(2, 3, 32, 32)}
    batch |= {"pixel_values_local": -pixels(2, 3, 32, 32), "num_local_patches": torch.tensor([1, 1])}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    model = finish(tf.DeepseekOcr2ForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    return Case(model, batch, sites, words(), known=_deepseek_ocr2_3b)


def _deepseek_ocr2_3b() -> tf.DeepseekOcr2Config:
    encoder = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    text = {"hidden_size": 1280, "num_attention_heads": 10, "num_hidden_layers": 2}
    text["mlp_layer_types"] = ["dense", "sparse"]
    return tf.DeepseekOcr2Config(text_config=text, vision_config={"encoder_config": encoder})


@architecture("unlimited_ocr")
def unlimited_ocr() -> Case:
    """Build an Unlimited-OCR. It puts newlines and a separator between its visual tokens after the projector."""
    config = tf.UnlimitedOcrConfig(
        text_config=OCR_TEXT | {"sliding_window": 16},
        vision_config={
            "sam_config": SAM | {"downsample_channels": [12, VISION_WIDTH]},
            "encoder_config": VISION | {"image_size": 8, "patch_size": 4},
        },
        image_token_id=IMAGE_TOKEN,
    )
    batch = token_rows(1, 2 * (2 + 1) + 1) | {"pixel_values": pixels(2, 3, 32, 32)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    model = finish(tf.UnlimitedOcrForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    return Case(model, batch, sites, words())
