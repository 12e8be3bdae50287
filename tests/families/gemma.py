"""Build tiny models of Gemma 3, Gemma 3n, Gemma 4 and PaliGemma.

Gemma 3's image processor, special tokens and chat template come from transformers' `convert_gemma3_weights.py`. The
other settings come from `convert_gemma3n_weights.py`, `convert_paligemma_weights_to_hf.py` and the processors' own
defaults. Gemma 4's chat template comes from llama.cpp's `models/templates`. The published one no longer puts line
feeds around an image. PaliGemma publishes no chat template. Its processor takes a prompt, and the answer as
`suffix`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

from .family import family
from .parts import TEXT, VISION, image_processor, real_towers, save, sentence_piece, template

FIRST = ["<pad>", "<eos>", "<bos>", "<unk>"]
HALVES: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


def gemma_tokenizer(specials: list[str], **named: Any) -> Any:
    """Return a tokenizer that adds no space before the text and writes `<bos>` first."""
    usual = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "padding_side": "left"}
    return sentence_piece(specials, first=FIRST, prefix=False, **usual | named)


@family("gemma3", "<image_soft_token>", "<end_of_turn>", alternates=True, strips=True)
def gemma3(directory: Path) -> None:
    """Build a Gemma 3. The processor replaces `<start_of_image>` in the prompt with the 256 tokens of an image and
    line feeds around them."""
    tokenizer = gemma_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    images = image_processor("Gemma3ImageProcessor", size={"height": 896, "width": 896}, **HALVES)
    processor = tf.Gemma3Processor(images, tokenizer, image_seq_length=256, chat_template=template("gemma3"))
    config = tf.Gemma3Config(
        text_config=TEXT | {
            "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 512, "query_pre_attn_scalar": 16,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        },
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=896, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=256, image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    save(directory, "Gemma3ForConditionalGeneration", config, processor, end="<end_of_turn>")


@family(
    "paligemma", "<image>", None, text_only=False, system=False, chat_template=False,
    trains="no: its processor takes a prompt and its answer apart",
)  # fmt: skip
def paligemma(directory: Path) -> None:
    """Build a PaliGemma. The 256 tokens of every image come before the prompt. A line feed ends the prompt, and
    `<eos>` ends the answer."""
    places = [f"<loc{place:04d}>" for place in range(1024)]
    segments = [f"<seg{part:03d}>" for part in range(128)]
    # The processor writes <bos> itself, behind the image.
    tokenizer = gemma_tokenizer([*places, *segments], image_token="<image>", starts_with_bos=False)
    images = image_processor("SiglipImageProcessor", size={"height": 224, "width": 224}, **HALVES | {"resample": 3})
    images.image_seq_length = 256
    processor = tf.PaliGemmaProcessor(images, tokenizer)
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=224, patch_size=14, vision_use_head=False),
        text_config=tf.GemmaConfig(
            **TEXT, head_dim=16, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2
        ),
        image_token_index=tokenizer.image_token_id, projection_dim=TEXT["hidden_size"], pad_token_id=0,
    )  # fmt: skip
    save(directory, "PaliGemmaForConditionalGeneration", config, processor)


GEMMA4_TOKENS = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip


@family(
    "gemma4",
    "<|image|>",
    "<turn|>",
    video=True,
    audio=True,
    prompt_is_prefix=False,
    needs=("torchvision",),
    strips=True,
)
def gemma4(directory: Path) -> None:
    """Build a Gemma 4. An image has one token for each 48 x 48 pixels, about 280 at any size. The prompt ends with an
    empty thought, which a conversation with its answer does not have."""
    marks = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|video|>"]
    tokenizer = gemma_tokenizer(marks, **GEMMA4_TOKENS, eos_token="<turn|>")
    images = image_processor("Gemma4ImageProcessor")
    videos, sound = tf.Gemma4VideoProcessor(), tf.Gemma4AudioFeatureExtractor()
    processor = tf.Gemma4Processor(sound, images, tokenizer, videos, chat_template=template("gemma4"))
    config = tf.Gemma4Config(
        text_config=TEXT | {
            "vocab_size": len(tokenizer), "head_dim": 16, "global_head_dim": 16, "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": len(tokenizer), "hidden_size_per_layer_input": 8, "pad_token_id": 0,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 2,
        },
        vision_config=VISION | {
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 16, "pooling_kernel_size": 3,
            "position_embedding_size": 2560,
        },
        audio_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [128, 4],
            "output_proj_dims": 24,
        },
        image_token_id=tokenizer.image_token_id, audio_token_id=tokenizer.audio_token_id,
        video_token_id=processor.video_token_id, boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id, boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
    )  # fmt: skip
    save(directory, "Gemma4ForConditionalGeneration", config, processor)


@family(
    "gemma3n",
    "<image_soft_token>",
    "<end_of_turn>",
    audio=True,
    needs=("torchvision", "timm"),
    alternates=True,
    strips=True,
)
def gemma3n(directory: Path) -> None:
    """Build a Gemma 3n. An image has 256 tokens, and a sound has 188. Its tower comes from timm, so a small ConvNeXt
    stands in. Like MobileNet v5, the ConvNeXt makes 16 x 16 features of 768 x 768 pixels."""
    # Its vocabulary is the text's, then the tower's, then that of sound.
    tokenizer = gemma_tokenizer(
        [], turn_token="<start_of_turn>", eot_token="<end_of_turn>", boi_token="<start_of_image>",
        boa_token="<start_of_audio>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
        eoa_token="<end_of_audio>", audio_token="<audio_soft_token>",
    )  # fmt: skip
    size = {"height": 768, "width": 768}
    images = image_processor("SiglipImageProcessor", size=size, do_normalize=False, resample=2)
    sound = tf.Gemma3nAudioFeatureExtractor()
    processor = tf.Gemma3nProcessor(sound, images, tokenizer, chat_template=template("gemma3n"))
    seen, heard = tokenizer.eoi_token_id, tokenizer.eoa_token_id
    config = tf.Gemma3nConfig(
        text_config=TEXT | {
            "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 512, "laurel_rank": 4,
            "altup_num_inputs": 4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": seen, "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.95, 0.0], "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        },
        vision_config={
            "architecture": "test_convnext", "model_args": {"patch_size": 6}, "hidden_size": 64,
            "vocab_offset": seen, "vocab_size": heard - seen,
        },
        audio_config={
            "hidden_size": 16, "vocab_offset": heard, "vocab_size": len(tokenizer) - heard,
            "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "sscp_conv_channel_size": [8, 4],
        },
        image_token_id=tokenizer.image_token_id, audio_token_id=tokenizer.audio_token_id,
        boi_token_id=tokenizer.boi_token_id, eoi_token_id=seen, boa_token_id=tokenizer.boa_token_id,
        eoa_token_id=heard, vision_soft_tokens_per_image=256, audio_soft_tokens_per_image=188,
    )  # fmt: skip
    with real_towers():
        save(directory, "Gemma3nForConditionalGeneration", config, processor, end="<end_of_turn>")
