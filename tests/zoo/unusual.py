"""Builders of unusual hosts, with image tokens in the vocabulary, patches without a tower, or images before
the text."""

from __future__ import annotations

import inspect

import torch
import transformers as tf

from .case import (
    IMAGE_TOKEN,
    TEXT,
    VISION,
    VISION_WIDTH,
    WIDTH,
    Case,
    architecture,
    finish,
    pixels,
    token_rows,
    words,
)


@architecture("chameleon")
def chameleon() -> Case:
    """Build a Chameleon. Its images are tokens of the vocabulary, rows 20 to 27 of the table, one for each of eight
    codebook entries."""
    codes = {f"IMGIMG{'ABCDEFGH'[code]}Z": 20 + code for code in range(8)}
    config = tf.ChameleonConfig(
        **TEXT,
        vocabulary_map={"<image>": IMAGE_TOKEN, **codes},
        vq_config={
            "embed_dim": VISION_WIDTH, "num_embeddings": 8, "latent_channels": VISION_WIDTH, "resolution": 8,
            "base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1,
        },
    )  # fmt: skip
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, 8, 8)}
    sites = {"text": ["model.embed_tokens"], "vision": ["model.embed_tokens[20:28]"]}
    case = Case(finish(tf.ChameleonForConditionalGeneration, config), batch, sites, words())
    known = {"<image>": 8711, **{f"IMGIMG{code}": 4 + code for code in range(8192)}}
    case.known = lambda: tf.ChameleonConfig(vocabulary_map=known)
    return case


@architecture("emu3")
def emu3() -> Case:
    """Build an Emu3. Rows 20 to 27 of its table are eight image codes, and row 28 ends a line of them."""
    codes = {f"<|visual token {code:06}|>": 20 + code for code in range(8)}
    config = tf.Emu3Config(
        text_config=TEXT | {"attention_dropout": 0.0},
        vq_config={
            "codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 64,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "temporal_downsample_factor": 1,
        },
        vocabulary_map={"<image>": IMAGE_TOKEN, "<|extra_200|>": 28, **codes},
    )  # fmt: skip
    model = finish(tf.Emu3ForConditionalGeneration, config)
    size = 4 * model.model.vqmodel.vision_spatial_factor
    batch = token_rows(1, 4 * (4 + 1)) | {"pixel_values": pixels(2, 3, size, size)}
    batch["image_sizes"] = torch.tensor([[size, size]] * 2)
    sites = {"text": ["model.text_model.embed_tokens"], "vision": ["model.text_model.embed_tokens[20:28]"]}
    case = Case(model, batch, sites, words())
    known = {"<image>": 151851, "<|extra_200|>": 151846}
    known |= {f"<|visual token {code:06}|>": 151854 + code for code in range(32768)}
    case.known = lambda: tf.Emu3Config(vocabulary_map=known)
    return case


@architecture("fuyu")
def fuyu() -> Case:
    """Build a Fuyu. It has no tower, only a linear map of raw patches."""
    text = tf.PersimmonConfig(**TEXT, hidden_act="gelu")
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": WIDTH}
    config = tf.FuyuConfig(text_config=text.to_dict(), image_token_id=IMAGE_TOKEN, **sizes)
    model = finish(tf.FuyuForCausalLM, config)
    patches = "image_patches" if "image_patches" in inspect.signature(model.forward).parameters else "pixel_values"
    batch = token_rows(1, 4) | {patches: pixels(2, 4, 4 * 4 * 3)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.vision_embed_tokens"]}
    return Case(model, batch, sites, words())


@architecture("git")
def git() -> Case:
    """Build a GIT. It puts images before the text, without placeholders."""
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = tf.GitConfig(**text, vision_config=VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ids = words()["input_ids"].repeat(2, 1)
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids, "pixel_values": pixels(2, 3, 8, 8)}
    sites = {"text": ["git.embeddings.word_embeddings"], "vision": ["git.visual_projection"]}
    return Case(finish(tf.GitForCausalLM, config), batch, sites, words())
