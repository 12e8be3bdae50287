"""Builders of BLIP-2 and InstructBLIP, which put a Q-Former before any language model."""

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

QFORMER = {
    "vocab_size": VOCABULARY, "hidden_size": VISION_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "encoder_hidden_size": VISION_WIDTH, "cross_attention_frequency": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
OPT_SITES = ("language_model.model.decoder.embed_tokens",)
T5_SITES = tuple(f"language_model.{part}" for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"))


def _blip(
    prefix: str,
    text_config: Any,
    text_sites: tuple[str, ...],
    frames: int | None = None,
    **settings: Any,
) -> Case:
    """Build a host with a Q-Former before a language model. The family's class names begin with `prefix`."""
    instructed = prefix != "Blip2"
    qformer_class = getattr(tf, f"{prefix}QFormerConfig")
    config = getattr(tf, f"{prefix}Config")(
        vision_config=getattr(tf, f"{prefix}VisionConfig")(**VISION).to_dict(),
        qformer_config=qformer_class(**QFORMER).to_dict(),
        text_config=text_config.to_dict(),
        num_query_tokens=3,
        **settings,
    )
    shape = (2, 3, IMAGE_SIZE, IMAGE_SIZE) if frames is None else (2, frames, 3, IMAGE_SIZE, IMAGE_SIZE)
    batch = token_rows(1, 3 * (frames or 1)) | {"pixel_values": pixels(*shape)}
    if instructed:
        question = torch.tensor([[1, 5, 6], [1, 7, 8]])
        batch |= {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    if text_config.is_encoder_decoder:
        batch["labels"] = torch.tensor([[5, 6, 2], [7, 8, 2]])
    text_only = {key: value[:1] for key, value in batch.items() if key != "labels"} | words()  # it wants an image
    if text_config.is_encoder_decoder:
        text_only["labels"] = batch["labels"][:1]
    sites = {"text": list(text_sites), "vision": ["language_projection"]}
    return Case(finish(getattr(tf, f"{prefix}ForConditionalGeneration"), config), batch, sites, text_only)


@architecture("instructblip")
def instructblip_opt() -> Case:
    return _blip("InstructBlip", tf.OPTConfig(**OPT), OPT_SITES, image_token_index=IMAGE_TOKEN)


@architecture("instructblip_t5")
def instructblip_t5() -> Case:
    return _blip("InstructBlip", tf.T5Config(**T5), T5_SITES, image_token_index=IMAGE_TOKEN)


@architecture("instructblipvideo")
def instructblipvideo() -> Case:
    """Build an InstructBLIP-Video whose rows have two frames, each with its own queries."""
    return _blip("InstructBlipVideo", tf.OPTConfig(**OPT), OPT_SITES, frames=2, video_token_index=IMAGE_TOKEN)


@architecture("blip-2")
def blip2_opt() -> Case:
    return _blip("Blip2", tf.OPTConfig(**OPT), OPT_SITES, image_token_index=IMAGE_TOKEN)


@architecture("blip-2_t5")
def blip2_t5() -> Case:
    return _blip("Blip2", tf.T5Config(**T5), T5_SITES, image_token_index=IMAGE_TOKEN)
