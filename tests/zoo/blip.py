"""BLIP-2 and InstructBLIP: a Q-Former before any language model."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .case import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    VISION,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    Case,
    architecture,
    finish,
    pixels,
    token_rows,
    words,
)


def _instructblip(text_config: Any, *text_sites: str) -> Case:
    config = tf.InstructBlipConfig(
        vision_config=tf.InstructBlipVisionConfig(**VISION).to_dict(),
        qformer_config=tf.InstructBlipQFormerConfig(
            vocab_size=VOCABULARY, hidden_size=VISION_WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, encoder_hidden_size=VISION_WIDTH, cross_attention_frequency=1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ).to_dict(),
        text_config=text_config.to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    question = torch.tensor([[1, 5, 6], [1, 7, 8]])
    batch = token_rows(1, 3) | {
        "pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "qformer_input_ids": question,
        "qformer_attention_mask": torch.ones_like(question),
    }
    if text_config.is_encoder_decoder:
        batch["labels"] = torch.tensor([[5, 6, 2], [7, 8, 2]])
    sites = {"text": list(text_sites), "vision": ["language_projection"]}
    text_only = {key: value[:1] for key, value in batch.items() if key != "labels"} | words()  # it wants an image
    if text_config.is_encoder_decoder:
        text_only["labels"] = batch["labels"][:1]
    return Case(finish(tf.InstructBlipForConditionalGeneration, config), batch, sites, text_only)


@architecture("instructblip")
def instructblip_opt() -> Case:
    text = tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _instructblip(text, "language_model.model.decoder.embed_tokens")


@architecture("instructblip_t5")
def instructblip_t5() -> Case:
    text = tf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=64, d_kv=16, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    parts = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    return _instructblip(text, *(f"language_model.{part}" for part in parts))
