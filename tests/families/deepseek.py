"""Build a tiny DeepSeek-VL.

The chat template, which is also Janus's, comes from transformers' `convert_deepseek_vl_weights_to_hf.py`. The image
settings come from the `preprocessor_config.json` of deepseek-community/deepseek-vl-1.3b-chat.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import family
from .parts import TEXT, VISION, byte_level, image_processor, save, template

END = "<｜end▁of▁sentence｜>"


@family("deepseek_vl", "<image_placeholder>", END, closes_last=False, strips=True)
def deepseek_vl(directory: Path) -> None:
    """Build a DeepSeek-VL. Every image has 576 tokens. The template writes the end of an answer only if another turn
    follows."""
    tokenizer = byte_level(
        [], starts_with_bos=True, bos_token="<｜begin▁of▁sentence｜>", eos_token=END, pad_token="<｜▁pad▁｜>",
        image_token="<image_placeholder>",
    )  # fmt: skip
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = image_processor("DeepseekVLImageProcessor", size={"height": 384, "width": 384}, min_size=14, **halves)
    processor = tf.DeepseekVLProcessor(images, tokenizer, num_image_tokens=576, chat_template=template("deepseek_vl"))
    config = tf.DeepseekVLConfig(
        text_config=tf.LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=384, patch_size=16, vision_use_head=False),
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    save(directory, "DeepseekVLForConditionalGeneration", config, processor)
