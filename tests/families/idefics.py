"""Build tiny models of SmolVLM and Idefics 3.

The settings come from transformers' `convert_idefics3_weights_to_hf.py`, the processors' own defaults, and the
`preprocessor_config.json` of HuggingFaceTB/SmolVLM2-2.2B-Instruct and HuggingFaceM4/Idefics3-8B-Llama3. SmolVLM's
processor has the chat template as `DEFAULT_CHAT_TEMPLATE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from .family import family
from .parts import TEXT, VISION, byte_level, image_processor, save, template

TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
HALVES: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
AROUND = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}  # fmt: skip


@family("smolvlm", "<image>", "<end_of_utterance>", video=True, needs=("torchvision", "num2words"))
def smolvlm(directory: Path) -> None:
    """Build a SmolVLM with the settings of SmolVLM2 2.2B. An image becomes up to 4 x 4 tiles of 81 tokens, and one
    tile of the whole image."""
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TILES], bos_token="<|im_start|>",
        eos_token="<end_of_utterance>", pad_token="<|im_end|>", **AROUND,
    )  # fmt: skip
    size = {"size": {"longest_edge": 4 * 384}, "max_image_size": {"longest_edge": 384}}
    images = image_processor("SmolVLMImageProcessor", **size, **HALVES)
    videos = tf.SmolVLMVideoProcessor(
        size={"longest_edge": 384}, max_image_size={"longest_edge": 384}, num_frames=64, fps=1, **HALVES
    )
    processor = tf.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=81, chat_template=template("smolvlm"))
    config = tf.SmolVLMConfig(
        vision_config=VISION | {"image_size": 384, "patch_size": 14}, text_config=_llama(tokenizer), scale_factor=3,
        image_token_id=tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    save(directory, "SmolVLMForConditionalGeneration", config, processor)


@family("idefics3", "<image>", "<end_of_utterance>")
def idefics3(directory: Path) -> None:
    """Build an Idefics 3. An image becomes up to 4 x 4 tiles of 169 tokens, and one tile of the whole image."""
    tokenizer = byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>", *TILES], bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>", pad_token="<|end_of_text|>", starts_with_bos=True, **AROUND,
    )  # fmt: skip
    size = {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}}
    images = image_processor("Idefics3ImageProcessor", **size, **HALVES)
    processor = tf.Idefics3Processor(images, tokenizer, image_seq_len=169, chat_template=template("idefics3"))
    config = tf.Idefics3Config(
        vision_config=VISION | {"image_size": 364, "patch_size": 14}, text_config=_llama(tokenizer), scale_factor=2,
        image_token_id=tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    save(directory, "Idefics3ForConditionalGeneration", config, processor, end="<end_of_utterance>")


def _llama(tokenizer: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(
        **TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=16384,
    )  # fmt: skip
