"""Build a tiny Kimi K2.5.

The settings come from transformers' processor and its image processor's defaults. The tokens around an image come
from vLLM's `kimi_k25.py`. The turns are those of Kimi K2's chat template in llama.cpp's `models/templates`.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import ABSENT, family
from .parts import TEXT, VISION, byte_level, image_processor, save, template

ABSENT["kimi_vl"] = "transformers 5.23 has no kimi_vl; its kimi_k25 has the same tower and tokens"

TURNS = ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>", "<think>", "</think>"]
MEDIA = ["<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>", "<|kimi_k25_video_placeholder|>"]


@family("kimi_k25", "<|media_pad|>", "<|im_end|>", needs=("torchvision",))
def kimi_k25(directory: Path) -> None:
    """Build a Kimi K2.5. An image has one token for each 28 x 28 pixels. An answer begins with an empty thought, and a
    prompt ends with an open one.

    The processor takes videos, but transformers 5.23 fails on them, because it counts features before the frames are
    pooled.
    """
    tokenizer = byte_level([*TURNS, *MEDIA], bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]")
    images, videos = image_processor("Kimi_K25ImageProcessor"), tf.Kimi_K25VideoProcessor()
    processor = tf.Kimi_K25Processor(images, tokenizer, videos, chat_template=template("kimi_k25"))
    ids = tokenizer.convert_tokens_to_ids
    text = TEXT | {
        "model_type": "deepseek_v3", "vocab_size": len(tokenizer), "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = tf.Kimi_K25Config(
        text_config=text, vision_config=VISION | {"patch_size": 14, "pos_emb_height": 64, "pos_emb_width": 64},
        projection_hidden_size=VISION["hidden_size"], image_token_id=ids("<|media_pad|>"),
        video_token_id=ids("<|kimi_k25_video_placeholder|>"), vision_start_token_id=ids("<|media_begin|>"),
        vision_end_token_id=ids("<|media_end|>"),
    )  # fmt: skip
    save(directory, "Kimi_K25ForConditionalGeneration", config, processor, end="<|im_end|>")
