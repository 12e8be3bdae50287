"""Build a tiny Molmo 2.

The settings come from transformers' processor and its image processor's defaults. The special tokens are those of
allenai/Molmo2-8B. The chat template is Qwen's, with a number before each of several images.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import family
from .parts import TEXT, VISION, VISION_WIDTH, WIDTH, byte_level, image_processor, save, template

EDGES = ["<im_start>", "<im_end>", "<im_col>", "<low_res_im_start>", "<im_low>", "<frame_start>", "<frame_end>"]


@family(
    "molmo2",
    "<im_patch>",
    "<|im_end|>",
    video=True,
    system=False,
    needs=("torchvision",),
    images_first=True,
    alternates=True,
)
def molmo2(directory: Path) -> None:
    """Build a Molmo 2. An image becomes the whole in 14 x 14 tokens, then up to 8 crops that overlap. The processor
    writes the first token of a text."""
    tokenizer = byte_level(
        ["<|im_start|>", "<|im_end|>", *EDGES, "<im_patch>", "<|image|>", "<|video|>"],
        bos_token="<|im_end|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    images = image_processor("Molmo2ImageProcessor")
    videos = tf.Molmo2VideoProcessor()
    processor = tf.Molmo2Processor(images, videos, tokenizer, chat_template=template("molmo2"))
    ids = tokenizer.convert_tokens_to_ids
    config = tf.Molmo2Config(
        text_config=TEXT | {
            "head_dim": 16, "vocab_size": len(tokenizer), "additional_vocab_size": 8,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=VISION | {
            "num_key_value_heads": 2, "head_dim": 8, "image_size": [378, 378], "patch_size": 14,
        },
        adapter_config={
            "vision_feature_layer": [1, 0], "hidden_size": VISION_WIDTH, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "text_hidden_size": WIDTH,
        },
        image_patch_id=ids("<im_patch>"), image_start_token_id=ids("<im_start>"), image_end_token_id=ids("<im_end>"),
        image_col_id=ids("<im_col>"), low_res_image_start_token_id=ids("<low_res_im_start>"),
        image_low_res_id=ids("<im_low>"), frame_start_token_id=ids("<frame_start>"),
        frame_end_token_id=ids("<frame_end>"),
    )  # fmt: skip
    save(directory, "Molmo2ForConditionalGeneration", config, processor)
