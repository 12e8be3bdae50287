"""Build a tiny Pixtral and a tiny Mistral 3. Pixtral is a LLaVA with a Pixtral tower, as in transformers.

The settings come from transformers' `convert_pixtral_weights_to_hf.py` and `convert_mistral3_weights_to_hf.py`. The
image sizes are those of mistral-community/pixtral-12b and mistralai/Mistral-Small-3.1-24B-Instruct-2503. The chat
template of the latter comes from llama.cpp's `models/templates`. The published system message is longer. Both system
messages contain today's date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from .family import family
from .parts import TEXT, VISION, byte_level, image_processor, save, template

MARKS = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
IMAGE = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def _tokenizer() -> Any:
    return byte_level(
        [*MARKS, *IMAGE], starts_with_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _tower(image_size: int, patch_size: int) -> tf.PixtralVisionConfig:
    return tf.PixtralVisionConfig(**VISION, head_dim=8, image_size=image_size, patch_size=patch_size)


def _text(tokenizer: Any) -> tf.MistralConfig:
    return tf.MistralConfig(
        **TEXT, head_dim=16, sliding_window=None, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


@family(
    "pixtral", "[IMG]", "</s>", keeps_system=False, prompt_is_prefix=False, needs=("torchvision",), alternates=True
)
def pixtral(directory: Path) -> None:
    """Build a Pixtral. An image has one token for each 16 x 16 pixels, and one after each row. The template writes a
    system message before the last question, and only if no answer follows it. Without a system message, a prompt is a
    prefix of the conversation."""
    tokenizer = _tokenizer()
    images = image_processor("PixtralImageProcessor", size={"longest_edge": 1024}, patch_size=16)
    processor = tf.PixtralProcessor(
        images, tokenizer, patch_size=16, spatial_merge_size=1, chat_template=template("pixtral")
    )
    config = tf.LlavaConfig(
        vision_config=_tower(1024, 16), text_config=_text(tokenizer), image_token_index=processor.image_token_id,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=1,
    )  # fmt: skip
    save(directory, "LlavaForConditionalGeneration", config, processor)


@family("mistral3", "[IMG]", "</s>", needs=("torchvision",), alternates=True)
def mistral3(directory: Path) -> None:
    """Build a Mistral 3. An image has one token for each 28 x 28 pixels, and one after each row. Without a system
    message, the template writes one with the date."""
    tokenizer = _tokenizer()
    images = image_processor("PixtralImageProcessor", size={"longest_edge": 1540}, patch_size=14)
    processor = tf.PixtralProcessor(
        images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=template("mistral3")
    )
    config = tf.Mistral3Config(
        vision_config=_tower(1540, 14), text_config=_text(tokenizer), image_token_index=processor.image_token_id,
        vision_feature_layer=-1, spatial_merge_size=2, multimodal_projector_bias=False,
    )  # fmt: skip
    save(directory, "Mistral3ForConditionalGeneration", config, processor)
