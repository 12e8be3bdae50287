"""Builders of LLaVA and similar hosts, which have a projector between a tower and a language model."""

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
    Case,
    architecture,
    finish,
    pixels,
    token_rows,
    words,
)


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


def _kin(
    name: str, tokens: int, vision: Any, *, text: Any = None, image: dict[str, Any] | None = None, **settings: Any
) -> Case:
    """Build a host that differs from LLaVA in its parts. Its class names begin with `name`, and `image` holds its
    image inputs."""
    text = tf.LlamaConfig(**TEXT) if text is None else text
    config = getattr(tf, f"{name}Config")(vision_config=vision, text_config=text, **settings)
    batch = token_rows(1, tokens) | (image or {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)})
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Case(finish(getattr(tf, f"{name}ForConditionalGeneration"), config), batch, sites, words())


@architecture("vipllava")
def vipllava() -> Case:
    """Build a VipLLaVA. Its projector reads several layers of its tower."""
    vision = tf.CLIPVisionConfig(**VISION)
    layers = {"vision_feature_layer": [-1, -2], "vision_feature_layers": [-1, -2]}  # older transformers name several
    return _kin("VipLlava", 4, vision, image_token_index=IMAGE_TOKEN, **layers)


@architecture("llava_next_video")
def llava_next_video() -> Case:
    image = {
        "pixel_values": pixels(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2),
    }
    return _kin(
        "LlavaNextVideo", 10, tf.CLIPVisionConfig(**VISION), image=image, image_token_index=IMAGE_TOKEN,
        video_token_index=59, vision_feature_layer=-1, image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
    )  # fmt: skip


@architecture("llava_onevision")
def llava_onevision() -> Case:
    image = {
        "pixel_values": pixels(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2),
    }
    return _kin(
        "LlavaOnevision", 10, tf.SiglipVisionConfig(**VISION, vision_use_head=False), text=tf.Qwen2Config(**TEXT),
        image=image, image_token_index=IMAGE_TOKEN, video_token_index=59, image_grid_pinpoints=[[IMAGE_SIZE] * 2],
    )  # fmt: skip


@architecture("video_llava")
def video_llava() -> Case:
    """Build a Video-LLaVA. It has a tower for images and one for videos, which share one projector."""
    image = {"pixel_values_images": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    return _kin(
        "VideoLlava", 4, tf.CLIPVisionConfig(**VISION), image=image, image_token_index=IMAGE_TOKEN,
        video_token_index=59, vision_feature_layer=-1,
    )  # fmt: skip


@architecture("aya_vision")
def aya_vision() -> Case:
    vision = tf.SiglipVisionConfig(**VISION, vision_use_head=False)
    text = tf.Cohere2Config(**TEXT, sliding_window=16)
    case = _kin("AyaVision", 1, vision, text=text, image_token_index=IMAGE_TOKEN)
    known = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}  # the class's default has 14
    case.known = lambda: tf.AyaVisionConfig(vision_config=tf.SiglipVisionConfig(**known))
    return case


@architecture("cohere2_vision")
def cohere2_vision() -> Case:
    vision = tf.SiglipVisionConfig(**VISION, vision_use_head=False)
    text = tf.Cohere2Config(**TEXT, sliding_window=16)
    return _kin("Cohere2Vision", 1, vision, text=text, image_token_id=IMAGE_TOKEN, alignment_intermediate_size=32)


def _got_ocr2() -> Case:
    vision = {
        "hidden_size": VISION_WIDTH, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": PATCH, "mlp_dim": 32, "window_size": 4, "global_attn_indexes": [1],
    }  # fmt: skip
    image = {"pixel_values": pixels(2, 3, 32, 32)}
    return _kin("GotOcr2", 4, vision, text=tf.Qwen2Config(**TEXT), image=image, image_token_index=IMAGE_TOKEN)


@architecture("got_ocr2")
def got_ocr2() -> Case:
    return _got_ocr2()


@architecture("pp_chart2table")
def pp_chart2table() -> Case:
    """Build a PP-Chart2Table, which is GOT-OCR 2 under another name."""
    return _got_ocr2()


def _pixtral() -> Any:
    return tf.PixtralVisionConfig(
        **{k: v for k, v in VISION.items() if k != "image_size"}, image_size=IMAGE_SIZE, head_dim=8
    )


def _mistral3_image() -> dict[str, Any]:
    return {
        "pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2),
    }


@architecture("mistral3")
def mistral3() -> Case:
    """Build a Mistral 3. Its projector also takes the images' sizes, and it reads all images at once."""
    text = tf.MistralConfig(**TEXT, head_dim=16)
    return _kin("Mistral3", 1, _pixtral(), text=text, image=_mistral3_image(), image_token_index=IMAGE_TOKEN)


@architecture("lighton_ocr")
def lighton_ocr() -> Case:
    text = tf.Qwen3Config(**TEXT, head_dim=16)
    case = _kin("LightOnOcr", 1, _pixtral(), text=text, image=_mistral3_image(), image_token_id=IMAGE_TOKEN)
    case.sites["vision"] = ["model.vision_projection"]
    return case


@architecture("qianfan_ocr")
def qianfan_ocr() -> Case:
    vision = VISION | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH] * 2, "drop_path_rate": 0.0}
    text = tf.Qwen3Config(**TEXT, head_dim=16)
    return _kin("QianfanOCR", 1, vision, text=text, image_token_id=IMAGE_TOKEN, image_seq_length=1)


# The next two have towers from timm, which needs torchvision, whose builds fit one build of PyTorch each. A tower of
# the same shape from transformers stands in.


@architecture("fast_vlm")
def fast_vlm() -> Case:
    """Build a FastVLM. Its tower returns a map of features, (batch, channels, height, width)."""

    def vision(width: int) -> Any:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, width], "depths": [1, 1], "layer_type": "basic"}
        return tf.ResNetConfig(**sizes, hidden_size=width)

    image = {"pixel_values": pixels(2, 3, 16, 16)}
    case = _kin(
        "FastVlm", 4, vision(VISION_WIDTH), text=tf.Qwen2Config(**TEXT), image=image, image_token_index=IMAGE_TOKEN
    )
    case.known = lambda: tf.FastVlmConfig(vision_config=vision(3072))
    return case


@architecture("perception_lm")
def perception_lm() -> Case:
    def vision(width: int) -> Any:
        return tf.CLIPVisionConfig(**VISION | {"hidden_size": width}, model_args={"embed_dim": width})

    image = {"pixel_values": pixels(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    case = _kin("PerceptionLM", 4, vision(VISION_WIDTH), image=image, image_token_id=IMAGE_TOKEN, video_token_id=59)
    case.known = lambda: tf.PerceptionLMConfig(vision_config=vision(1536))
    return case
