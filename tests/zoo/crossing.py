"""Builders of hosts that read images by cross-attention or in an encoder's input, and of hosts that CROME refuses."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from .case import (
    IMAGE_SIZE,
    TEXT,
    VISION,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    Case,
    architecture,
    finish,
    pixels,
    refused,
    token_rows,
    words,
)

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ANSWERS = torch.tensor([[5, 6, 2], [7, 8, 2]])
NO_TEXT = {"text only": "It cannot run without an image."}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


@architecture("pix2struct")
def pix2struct() -> Case:
    """Build a Pix2Struct. It has no projector, and the decoder attends to the output of the tower's last norm, which
    has the decoder's width."""
    sizes = {"hidden_size": WIDTH, "d_ff": 64, "d_kv": 16, "dropout_rate": 0.0}
    config = tf.Pix2StructConfig(
        text_config={**sizes, "vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 2, **SPECIAL},
        vision_config={
            **sizes, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_embed_hidden_size": 12, "seq_len": 4,
        },
        **SPECIAL,
    )  # fmt: skip
    # The first two numbers of a patch are its row and column.
    place = torch.tensor([[[1.0, 1], [1, 2], [2, 1], [2, 2]]] * 2)
    batch = {"flattened_patches": torch.cat([place, pixels(2, 4, 12)], dim=-1), "labels": ANSWERS}
    batch["attention_mask"] = torch.ones(2, 4)
    sites = {"text": ["decoder.embed_tokens"], "vision": ["encoder.layernorm"]}
    model = finish(tf.Pix2StructForConditionalGeneration, config)
    return Case(model, batch, sites, None, not_applicable=NO_TEXT)


@architecture("pp_formulanet")
def pp_formulanet() -> Case:
    config = tf.PPFormulaNetConfig(
        text_config={
            "vocab_size": VOCABULARY, "d_model": WIDTH, "decoder_layers": 2, "decoder_ffn_dim": 64,
            "decoder_attention_heads": 2, "encoder_layers": 1, "encoder_attention_heads": 2, "dropout": 0.0,
            "max_position_embeddings": 64, "forced_eos_token_id": None, **SPECIAL,
        },
        vision_config={
            "hidden_size": VISION_WIDTH, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32,
            "post_conv_in_channels": 8, "post_conv_mid_channels": 8, "post_conv_out_channels": 8,
            "decoder_hidden_size": WIDTH,
        },
        **SPECIAL,
    )  # fmt: skip
    model = finish(tf.PPFormulaNetForConditionalGeneration, config)
    start = torch.tensor([[1, 5, 6], [1, 7, 8]])
    batch = {"pixel_values": pixels(2, 3, 16, 16), "decoder_input_ids": start, "labels": ANSWERS}
    sites = {"text": ["model.decoder.embed_tokens"], "vision": ["model.encoder.multi_modal_projector"]}
    case = Case(model, batch, sites, None, scaled_table=True, not_applicable=NO_TEXT)
    case.exclude_from_generate = ("labels", "decoder_input_ids")
    return case


@architecture("vision-encoder-decoder")
def vision_encoder_decoder() -> Case:
    """Build a vision encoder-decoder. It has a projection because its tower and its decoder differ in width."""
    tower, decoder = tf.ViTConfig(**VISION), tf.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tower, decoder)
    config.update(SPECIAL)
    model = finish(tf.VisionEncoderDecoderModel, config)
    batch = {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE), "labels": ANSWERS}
    sites = {"text": ["decoder.transformer.wte"], "vision": ["enc_to_dec_proj"]}
    case = Case(model, batch, sites, None, not_applicable=NO_TEXT)
    medium = tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    case.known = lambda: tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(), medium)
    return case


@architecture("udop")
def udop() -> Case:
    """Build a UDOP. It adds a patch to the word that lies on it, and the other patches follow the text."""
    config = tf.UdopConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        image_size=IMAGE_SIZE, patch_size=4, max_2d_position_embeddings=64, **SPECIAL,
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 2], [7, 8, 2]])
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.6, 0.1, 0.8, 0.3], [0.0, 0.0, 0.0, 0.0]]).repeat(2, 1, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "bbox": boxes, "labels": ANSWERS}
    batch["pixel_values"] = pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    text_only = {key: value[:1] for key, value in batch.items() if key != "pixel_values"}
    text = ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]
    sites = {"text": text, "vision": ["encoder.embed_patches"]}
    why = {"fold": "It scales its output where its head is tied to its table, and a merge unties them."}
    return Case(finish(tf.UdopForConditionalGeneration, config), batch, sites, text_only, not_applicable=why)


@architecture("evolla")
def evolla() -> Case:
    """Build an Evolla. It reads proteins instead of images, and its aligner layers attend to the resampled protein."""
    protein = {
        "vocab_size": 40, "hidden_size": VISION_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = tf.EvollaConfig(
        **TEXT, protein_encoder_config=protein, aligner_num_add_layers=1, aligner_attention_probs_dropout_prob=0.0,
        resampler_depth=1, resampler_dim_head=8, resampler_heads=2, resampler_num_latents=3,
    )  # fmt: skip
    model = finish(tf.EvollaForProteinText2Text, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_attention", "gate_ffw")):
                parameter.fill_(1.0)  # closed at first
    rows = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 10, 2]])
    batch = words() | {"labels": words()["input_ids"]}
    batch = {key: value.repeat(2, 1) for key, value in batch.items()}
    batch |= {"protein_input_ids": rows, "protein_attention_mask": torch.ones_like(rows)}
    sites = {"text": ["model.embed_tokens"], "protein": ["model.protein_encoder.sequence_compressor_resampler"]}
    return Case(model, batch, sites, words())


@architecture("pi0")
def pi0() -> Case:
    """Build a PI0. It is a PaliGemma with an action expert that reads its keys and values."""
    gemma = TEXT | {"head_dim": 16}
    config = tf.PI0Config(
        vlm_config=tf.PaliGemmaConfig(
            vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=tf.GemmaConfig(**gemma),
            image_token_index=60,
            projection_dim=WIDTH,
        ),
        dit_config=tf.GemmaConfig(**gemma | {"hidden_size": 16}),
        chunk_size=3,
        max_state_dim=4,
        max_action_dim=4,
    )
    batch = token_rows(1, 4)
    del batch["labels"]
    batch |= {
        "pixel_values": pixels(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": pixels(2, 4),
        "noise": pixels(2, 3, 4),
        "actions": -pixels(2, 3, 4),
        "timestep": torch.tensor([0.25, 0.5]),
    }
    sites = {
        "text": ["model.vlm.language_model.embed_tokens"],
        "vision": ["model.vlm.multi_modal_projector"],
    }
    why = NO_TEXT | {"generate": "It predicts actions, not text."}
    model = finish(tf.PI0ForConditionalGeneration, config)
    return Case(model, batch, sites, None, scaled_table=True, not_applicable=why)


@refused("mistral4", because="It takes text only; the class has no image input.")
def mistral4() -> nn.Module:
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8}
    heads = {"q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    return finish(tf.Mistral4ForCausalLM, tf.Mistral4Config(**TEXT, **sizes, **heads))


@refused("blip", because="Its decoder attends to the tower's states, which have the tower's width.")
def blip() -> nn.Module:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"encoder_hidden_size": VISION_WIDTH}
    return finish(tf.BlipForConditionalGeneration, tf.BlipConfig(text_config=text, vision_config=VISION))


@refused("idefics", because="Its layers attend to the tower's states, which have the tower's width.")
def idefics() -> nn.Module:
    vision = {k: v for k, v in VISION.items() if k != "hidden_size"} | {"embed_dim": VISION_WIDTH}
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return finish(tf.IdeficsForVisionText2Text, tf.IdeficsConfig(**text, vision_config=vision))


@refused("vision-encoder-decoder_no_projection", because="Tower and decoder have one width: nothing lies between.")
def vision_encoder_decoder_without_projection() -> nn.Module:
    tower = tf.ViTConfig(**VISION | {"hidden_size": WIDTH})
    decoder = tf.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tower, decoder)
    return finish(tf.VisionEncoderDecoderModel, config)
