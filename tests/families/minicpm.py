"""Build a tiny MiniCPM-V 4.6.

The settings come from transformers' processor and its image processor's defaults. The chat template is Qwen 3.5's,
without tools.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import family
from .parts import TEXT, VISION, byte_level, image_processor, save, template

ROPE = {
    "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
}  # fmt: skip


@family(
    "minicpmv4_6", "<|image_pad|>", "<|im_end|>", video=True, keeps_turns=False, needs=("torchvision",), strips=True
)
def minicpmv4_6(directory: Path) -> None:
    """Build a MiniCPM-V 4.6. An image becomes the whole and up to 9 slices, whose sizes depend on the image. The
    number of the image comes before them."""
    tokenizer = byte_level(
        ["<|im_start|>", "<think>", "</think>"], eos_token="<|im_end|>", pad_token="<|endoftext|>",
        image_token="<|image_pad|>", video_token="<|video_pad|>", image_start_token="<image>",
        image_end_token="</image>", slice_start_token="<slice>", slice_end_token="</slice>",
        image_id_start_token="<image_id>", image_id_end_token="</image_id>",
    )  # fmt: skip
    images, videos = image_processor("MiniCPMV4_6ImageProcessor"), tf.MiniCPMV4_6VideoProcessor()
    processor = tf.MiniCPMV4_6Processor(images, videos, tokenizer, chat_template=template("minicpmv4_6"))
    config = tf.MiniCPMV4_6Config(
        text_config=TEXT | {
            "model_type": "qwen3_5_text", "vocab_size": len(tokenizer), "head_dim": 16, "rope_parameters": ROPE,
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=VISION | {"image_size": 980, "patch_size": 14}, insert_layer_id=0,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id, downsample_mode="16x",
    )  # fmt: skip
    save(directory, "MiniCPMV4_6ForConditionalGeneration", config, processor)
