"""Tiny random vision-language models with a valid batch: one short function each, listed in HOSTS.

To add an architecture, write a builder that returns a `Host` and enter it in HOSTS; every test of
tests/tuner/test_hosts.py then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY, IMAGE_TOKEN, WIDTH, VISION_WIDTH, IMAGE_SIZE, PATCH = 64, 60, 32, 16, 8, 4

Batch = dict[str, torch.Tensor]

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}


@dataclass
class Host:
    """A model in eval mode, a batch of two rows with one image each, and a row without an image.

    Attributes:
        sites: branch -> full paths that CROME is expected to find.
        generate_keys: what of the batch `generate` takes.
        scaled_table: the embedding table multiplies its rows, so a merge is exact to one rounding only.
    """

    model: nn.Module
    batch: Batch
    sites: dict[str, list[str]]
    text_only: Batch
    scaled_table: bool = False
    exclude_from_generate: tuple[str, ...] = field(default=("labels",))

    def generate_inputs(self) -> Batch:
        return {key: value for key, value in self.batch.items() if key not in self.exclude_from_generate}


def token_rows(images: int, tokens_per_image: int, *, around: tuple[int, int] | None = None) -> Batch:
    """Two rows [1, (start) image tokens (end), two words], with labels on the words; `around` frames the image."""
    start, end = ([around[0]], [around[1]]) if around else ([], [])
    image = start + [IMAGE_TOKEN] * tokens_per_image + end
    ids = torch.tensor([[1] + image * images + [5, 6], [1] + image * images + [7, 8]])
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def words() -> Batch:
    ids = torch.tensor([[1, 9, 10, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def finish(model_class: type, config: Any) -> nn.Module:
    """Build with a fixed seed, at a scale where every part changes the logits."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 / max(parameter[0].numel(), 1) ** 0.25, generator=generator)
    return model


def llava(vision: dict[str, Any] | None = None, **text: Any) -> Host:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION | (vision or {})),
        text_config=tf.LlamaConfig(**TEXT | text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Host(finish(tf.LlavaForConditionalGeneration, config), batch, sites, words())


def llava_next() -> Host:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
    )
    # base image 4 tokens + one tile of 2 x 2, with a newline after each of its two rows
    batch = token_rows(1, 10) | {
        "pixel_values": pixels(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2),
    }
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Host(finish(tf.LlavaNextForConditionalGeneration, config), batch, sites, words())


def qwen2_5_vl() -> Host:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = tf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": VISION_WIDTH, "intermediate_size": 32, "num_heads": 2, "patch_size": PATCH,
            "out_hidden_size": WIDTH, "fullatt_block_indexes": [0], "window_size": 16, "spatial_merge_size": 2,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=59, vision_start_token_id=57, vision_end_token_id=58,
    )  # fmt: skip
    batch = token_rows(1, 4, around=(57, 58)) | {
        "pixel_values": pixels(2 * 16, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.visual.merger"]}
    return Host(finish(tf.Qwen2_5_VLForConditionalGeneration, config), batch, sites, words())


def gemma3() -> Host:
    config = tf.Gemma3Config(
        text_config=TEXT | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
        vision_config=tf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=57,
        eoi_token_index=58,
    )
    batch = token_rows(1, 4, around=(57, 58)) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Host(finish(tf.Gemma3ForConditionalGeneration, config), batch, sites, words(), scaled_table=True)


def paligemma() -> Host:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.GemmaConfig(**TEXT, head_dim=16),
        image_token_index=IMAGE_TOKEN,
        projection_dim=WIDTH,
    )
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    batch["token_type_ids"] = (batch["labels"] != -100).int()
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    model = finish(tf.PaliGemmaForConditionalGeneration, config)
    return Host(model, batch, sites, words(), scaled_table=True)


def internvl() -> Host:
    config = tf.InternVLConfig(
        vision_config=VISION | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH] * 2},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=1,
        vision_feature_layer=-1,
    )
    batch = token_rows(1, 1) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    return Host(finish(tf.InternVLForConditionalGeneration, config), batch, sites, words())


def _idefics3_like(config_class: type, model_class: type) -> Host:
    config = config_class(
        vision_config=VISION, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN, scale_factor=2
    )
    batch = token_rows(1, 1) | {"pixel_values": pixels(2, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    sites = {"text": ["model.text_model.embed_tokens"], "vision": ["model.connector"]}
    return Host(finish(model_class, config), batch, sites, words())


def idefics3() -> Host:
    return _idefics3_like(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)


def smolvlm() -> Host:
    return _idefics3_like(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)


def _instructblip(text_config: Any, text_site: str) -> Host:
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
    sites = {"text": [text_site], "vision": ["language_projection"]}
    text_only = {key: value[:1] for key, value in batch.items() if key != "labels"} | words()  # it wants an image
    if text_config.is_encoder_decoder:
        text_only["labels"] = batch["labels"][:1]
    return Host(finish(tf.InstructBlipForConditionalGeneration, config), batch, sites, text_only)


def instructblip_opt() -> Host:
    text = tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _instructblip(text, "language_model.model.decoder.embed_tokens")


def instructblip_t5() -> Host:
    text = tf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=64, d_kv=16, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return _instructblip(text, "language_model.shared")


HOSTS: dict[str, Callable[[], Host]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "instructblip_opt": instructblip_opt,
    "instructblip_t5": instructblip_t5,
}
