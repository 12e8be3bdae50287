"""Build tiny models of InternVL 3, Aya Vision, Llama 4 and Ovis 2, which cut an image into tiles of one size.

The settings come from transformers' `convert_internvl_weights_to_hf.py`, `convert_ovis2_weights_to_hf.py` and
`convert_llama4_weights_to_hf.py`, the processors' own defaults, and the `preprocessor_config.json` of
CohereLabs/aya-vision-8b. Llama 4's processor has the chat template. Aya Vision's published system message is longer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from .family import family
from .parts import TEXT, VISION, VISION_WIDTH, WIDTH, byte_level, image_processor, save, template

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALVES: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _qwen2(tokenizer: Any) -> tf.Qwen2Config:
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return tf.Qwen2Config(**TEXT, **end, vocab_size=len(tokenizer))


@family("internvl", "<IMG_CONTEXT>", "<|im_end|>", video=True, needs=("torchvision",))
def internvl(directory: Path) -> None:
    """Build an InternVL 3. An image becomes up to 12 tiles of 256 tokens, and one tile of the whole image."""
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>",
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    size = {"height": 448, "width": 448}
    images = image_processor("GotOcr2ImageProcessor", size=size, **IMAGENET)
    videos = tf.InternVLVideoProcessor(size=size, **IMAGENET)
    processor = tf.InternVLProcessor(
        images, tokenizer, videos, image_seq_length=256, chat_template=template("internvl")
    )
    config = tf.InternVLConfig(
        vision_config=VISION | {"image_size": [448, 448], "patch_size": [14, 14]}, text_config=_qwen2(tokenizer),
        image_token_id=processor.image_token_id, image_seq_length=256,
    )  # fmt: skip
    save(directory, "InternVLForConditionalGeneration", config, processor)


@family("ovis2", "<IMG_ATOM>", "<|im_end|>")
def ovis2(directory: Path) -> None:
    """Build an Ovis 2. An image becomes up to 12 tiles of 256 tokens, and one tile of the whole image. Its `<image>`
    is not a token. A system message comes second, after the one that the template always writes."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_ATOM>", *marks],
        eos_token="<|im_end|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    images = image_processor("Ovis2ImageProcessor", crop_to_patches=True, size={"height": 448, "width": 448})
    processor = tf.Ovis2Processor(images, tokenizer, image_seq_length=256, chat_template=template("ovis2"))
    config = tf.Ovis2Config(
        vision_config=VISION | {"image_size": 448, "patch_size": 14, "vocab_size": 64, "hidden_stride": 2},
        text_config=_qwen2(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks), vocab_size=len(tokenizer),
        hidden_size=WIDTH,
    )  # fmt: skip
    save(directory, "Ovis2ForConditionalGeneration", config, processor)


@family("aya_vision", "<|IMG_PATCH|>", "<|END_OF_TURN_TOKEN|>", images_first=True)
def aya_vision(directory: Path) -> None:
    """Build an Aya Vision. An image becomes up to 12 tiles of 169 tokens, and one tile of the whole image. Two tokens
    end an answer."""
    turns = ["<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    marks = ["<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"]
    tiles = [f"TILE_{number}" for number in range(1, 13)]
    tokenizer = byte_level(
        [*turns, *marks, *tiles, "TILE_GLOBAL", "<|IMG_PATCH|>", "<image>"], starts_with_bos=True,
        bos_token="<BOS_TOKEN>", eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>", unk_token="<UNK>",
    )  # fmt: skip
    images = image_processor("GotOcr2ImageProcessor", size={"height": 364, "width": 364}, **HALVES)
    processor = tf.AyaVisionProcessor(
        images, tokenizer, patch_size=14, img_size=364, downsample_factor=2, chat_template=template("aya_vision")
    )
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=364, patch_size=14, vision_use_head=False),
        text_config=tf.Cohere2Config(
            **TEXT, vocab_size=len(tokenizer), sliding_window=4096, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ),
        vision_feature_layer=-1, downsample_factor=2, image_token_index=processor.image_token_id,
    )  # fmt: skip
    save(directory, "AyaVisionForConditionalGeneration", config, processor)


@family("llama4", "<|patch|>", "<|eot|>", needs=("torchvision",))
def llama4(directory: Path) -> None:
    """Build a Llama 4. An image becomes up to 16 tiles of 144 tokens, and one tile of the whole image. The latter
    follows `<|image|>`, which stays one token."""
    marks = ["<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>"]
    tokenizer = byte_level(
        ["<|end_of_text|>", "<|header_start|>", "<|header_end|>", *marks, "<|patch|>"], starts_with_bos=True,
        bos_token="<|begin_of_text|>", eos_token="<|eot|>", pad_token="<|finetune_right_pad|>",
    )  # fmt: skip
    images = image_processor("Llama4ImageProcessor", size={"height": 336, "width": 336}, max_patches=16)
    processor = tf.Llama4Processor(images, tokenizer, chat_template=template("llama4"))
    ids = tokenizer.convert_tokens_to_ids
    config = tf.Llama4Config(
        text_config=TEXT | {
            "vocab_size": len(tokenizer), "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 4,
            "moe_layers": [1], "no_rope_layer_interval": 2, "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=VISION | {
            "image_size": 336, "patch_size": 14, "intermediate_size": 4 * VISION_WIDTH, "vision_output_dim": 24,
            "projector_input_dim": 24, "projector_output_dim": 24, "pixel_shuffle_ratio": 0.5,
        },
        image_token_index=ids("<|patch|>"), boi_token_index=ids("<|image_start|>"),
        eoi_token_index=ids("<|image_end|>"),
    )  # fmt: skip
    save(directory, "Llama4ForConditionalGeneration", config, processor)
