"""Build tiny models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

The settings come from transformers' processors and configurations. The image sizes come from the
`preprocessor_config.json` of Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-4B-Instruct.
For conversations without tools, the chat templates render the same text as the published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from .family import family
from .parts import TEXT, VISION_WIDTH, WIDTH, byte_level, image_processor, save, template

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIALS = [*CHATML, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# Positions of height and width for an image of any size, and of time for a video.
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
TOWER: dict[str, Any] = {
    "depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}
VIDEO_PIXELS = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}


def qwen_tokenizer() -> Any:
    return byte_level(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _text(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return TEXT | eos | {"vocab_size": len(tokenizer), "bos_token_id": None} | settings


@family("qwen2_vl", "<|image_pad|>", "<|im_end|>", video=True, needs=("torchvision",))
def qwen2_vl(directory: Path) -> None:
    """Build a Qwen2-VL. An image has one token for each 28 x 28 pixels, and its sides are rounded to multiples of
    28."""
    tokenizer = qwen_tokenizer()
    images = image_processor("Qwen2VLImageProcessor", size=PIXELS)
    videos = tf.Qwen2VLVideoProcessor(size=VIDEO_PIXELS)
    processor = tf.Qwen2VLProcessor(images, tokenizer, videos, chat_template=template("qwen2_vl"))
    tower = TOWER | {"embed_dim": VISION_WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    text = _text(tokenizer, rope_parameters=ROPE)
    config = tf.Qwen2VLConfig(text_config=text, vision_config=tower, **_ids(tokenizer))
    save(directory, "Qwen2VLForConditionalGeneration", config, processor)


@family("qwen2_5_vl", "<|image_pad|>", "<|im_end|>", video=True, needs=("torchvision",))
def qwen2_5_vl(directory: Path) -> None:
    """Build a Qwen2.5-VL. It is like Qwen2-VL, with window attention in its tower."""
    tokenizer = qwen_tokenizer()
    images = image_processor("Qwen2VLImageProcessor", size=PIXELS)
    videos = tf.Qwen2VLVideoProcessor(size=VIDEO_PIXELS)
    processor = tf.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template("qwen2_vl"))
    tower = TOWER | {
        "hidden_size": VISION_WIDTH, "intermediate_size": 32, "out_hidden_size": WIDTH, "window_size": 112,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _text(tokenizer, rope_parameters=ROPE)
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_ids(tokenizer))
    save(directory, "Qwen2_5_VLForConditionalGeneration", config, processor)


@family("qwen3_vl", "<|image_pad|>", "<|im_end|>", video=True, needs=("torchvision",))
def qwen3_vl(directory: Path) -> None:
    """Build a Qwen3-VL. An image has one token for each 32 x 32 pixels, and at least 64. The template adds no default
    system message, and a video's frames follow their time in seconds."""
    tokenizer = qwen_tokenizer()
    patches: dict[str, Any] = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    images = image_processor("Qwen2VLImageProcessor", size=size, **patches)
    videos = tf.Qwen3VLVideoProcessor()
    processor = tf.Qwen3VLProcessor(images, tokenizer, videos, chat_template=template("qwen3_vl"))
    tower = TOWER | {
        "patch_size": 16, "hidden_size": VISION_WIDTH, "intermediate_size": 32, "out_hidden_size": WIDTH,
        "num_position_embeddings": 48 * 48, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    rope = ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = _text(tokenizer, rope_parameters=rope, head_dim=16)
    config = tf.Qwen3VLConfig(text_config=text, vision_config=tower, **_ids(tokenizer))
    save(directory, "Qwen3VLForConditionalGeneration", config, processor)
