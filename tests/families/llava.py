"""Build tiny models of LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision.

The settings come from transformers' `convert_llava_weights_to_hf.py`, `convert_llava_next_weights_to_hf.py` and
`convert_llava_onevision_weights_to_hf.py`, and from the processors' own defaults. The chat templates render the same
text as those of llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-mistral-7b-hf and llava-hf/llava-onevision-
qwen2-7b-ov-hf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from .family import family
from .parts import TEXT, VISION, byte_level, image_processor, save, sentence_piece, template

CLIP = VISION | {"image_size": 336, "patch_size": 14, "projection_dim": 16}
CLIP_SIZE: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def _llama_tokenizer() -> Any:
    return sentence_piece(
        ["<image>", "<pad>"], first=["<unk>", "<s>", "</s>"], prefix=True,
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip


@family("llava", "<image>", None, generation=True, images_first=True)
def llava(directory: Path) -> None:
    """Build a LLaVA 1.5. Every image has 576 tokens, and the template writes no token after an answer."""
    tokenizer = _llama_tokenizer()
    images = image_processor("CLIPImageProcessor", **CLIP_SIZE)
    processor = tf.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("llava"),
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP),
        text_config=tf.LlamaConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_index=processor.image_token_id, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=576,
    )  # fmt: skip
    save(directory, "LlavaForConditionalGeneration", config, processor)


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@family("llava_next", "<image>", "</s>", images_first=True)
def llava_next(directory: Path) -> None:
    """Build a LLaVA 1.6 on Mistral. An image becomes the whole and up to four tiles, without padding and with a token
    at the end of each row."""
    tokenizer = _llama_tokenizer()
    images = image_processor("LlavaNextImageProcessor", **CLIP_SIZE, image_grid_pinpoints=PINPOINTS)
    processor = tf.LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("llava_next"),
    )  # fmt: skip
    text = tf.MistralConfig(
        **TEXT, head_dim=16, sliding_window=None, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP), text_config=text, image_token_index=processor.image_token_id,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_grid_pinpoints=PINPOINTS,
        image_seq_length=576,
    )  # fmt: skip
    save(directory, "LlavaNextForConditionalGeneration", config, processor)


@family(
    "llava_onevision",
    "<image>",
    "<|im_end|>",
    video=True,
    generation=True,
    prompt_is_prefix=False,
    needs=("torchvision",),
    images_first=True,
)
def llava_onevision(directory: Path) -> None:
    """Build a LLaVA-OneVision. An image becomes the whole and up to 6 x 6 tiles. The features of the tiles shrink
    together if there are more than nine."""
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        eos_token="<|im_end|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    grid = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    size = {"height": 384, "width": 384}
    images = image_processor("LlavaOnevisionImageProcessor", size=size, image_grid_pinpoints=grid)
    processor = tf.LlavaOnevisionProcessor(
        images, tokenizer, tf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=729,
        vision_feature_select_strategy="full", chat_template=template("llava_onevision"),
    )  # fmt: skip
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=384, patch_size=14, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_index=processor.image_token_id, video_token_index=processor.video_token_id,
        image_grid_pinpoints=grid, vision_feature_layer=-1, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    save(directory, "LlavaOnevisionForConditionalGeneration", config, processor)
