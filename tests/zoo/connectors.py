"""Builders of hosts with an unusual connector: Aria, DeepSeek-VL, Florence-2, LFM-VL, Llama 4, Mllama and others."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .case import (
    AUDIO_TOKEN,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PATCH,
    TEXT,
    VISION,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    Case,
    architecture,
    finish,
    pixels,
    rope,
    token_rows,
    words,
)
from .qwen import WINDOWED, build, image_rows, with_sound

TABLE = "model.language_model.embed_tokens"
SIGLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 16,
}  # fmt: skip


def _sites(vision: str) -> dict[str, list[str]]:
    return {"text": [TABLE], "vision": [vision]}


@architecture("lfm2_vl")
def lfm2_vl() -> Case:
    """Build an LFM2-VL. Its projector runs once for each image, on (1, height, width, channels)."""
    text = TEXT | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
    config = tf.Lfm2VlConfig(
        text_config=tf.Lfm2Config(**text),
        vision_config=tf.Siglip2VisionConfig(**vision, vision_use_head=False),
        image_token_id=IMAGE_TOKEN,
        projector_hidden_size=24,
    )
    batch = token_rows(1, 4) | {
        "pixel_values": pixels(2, 16, 3 * PATCH * PATCH),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    }
    case = Case(
        build(tf.Lfm2VlForConditionalGeneration, config), batch, _sites("model.multi_modal_projector"), words()
    )
    case.known = lambda: tf.Lfm2VlConfig(
        text_config=tf.Lfm2Config(hidden_size=2048, num_hidden_layers=16),
        vision_config=tf.Siglip2VisionConfig(hidden_size=1152, num_attention_heads=16, vision_use_head=False),
    )
    return case


@architecture("deepseek_vl")
def deepseek_vl() -> Case:
    config = tf.DeepseekVLConfig(
        text_config=tf.LlamaConfig(**TEXT),
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_id=IMAGE_TOKEN,
    )
    batch = token_rows(1, 4) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    case = Case(build(tf.DeepseekVLForConditionalGeneration, config), batch, _sites("model.aligner"), words())
    case.known = lambda: tf.DeepseekVLConfig(
        text_config={"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
        vision_config=SIGLIP_LARGE,
    )
    return case


@architecture("deepseek_vl_hybrid")
def deepseek_vl_hybrid() -> Case:
    """Build a DeepSeek-VL hybrid. Its aligner takes the outputs of a SigLIP tower and a SAM tower as arguments and
    joins them."""
    sam = tf.SamVisionConfig(
        hidden_size=VISION_WIDTH, output_channels=4, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32,
        image_size=16, patch_size=PATCH, window_size=2, global_attn_indexes=[0], num_pos_feats=8,
    )  # fmt: skip
    config = tf.DeepseekVLHybridConfig(
        text_config=tf.LlamaConfig(**TEXT),
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        high_res_vision_config=sam,
        image_token_id=IMAGE_TOKEN,
    )
    batch = token_rows(1, 4) | {
        "pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "high_res_pixel_values": pixels(2, 3, 16, 16),
    }
    model = build(tf.DeepseekVLHybridForConditionalGeneration, config)
    return Case(model, batch, _sites("model.aligner"), words())


@architecture("hyperclovax_vision_v2")
def hyperclovax_vision_v2() -> Case:
    """Build a HyperCLOVA X Vision v2. It projects the merged output of a Qwen2.5-VL tower, which already has the
    language model's width."""
    config = tf.HyperCLOVAXVisionV2Config(
        text_config={"model_type": "hyperclovax"} | TEXT,
        vision_config={"model_type": "qwen2_5_vl_vision"} | WINDOWED,
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
    )
    batch = image_rows()
    del batch["mm_token_type_ids"]
    model = build(tf.HyperCLOVAXVisionV2ForConditionalGeneration, config)
    case = Case(model, batch, _sites("model.projector"), words())
    case.known = lambda: tf.HyperCLOVAXVisionV2Config(
        text_config={
            "model_type": "hyperclovax", "hidden_size": 5120, "intermediate_size": 24192, "num_hidden_layers": 72,
            "num_attention_heads": 40, "num_key_value_heads": 8,
        },
        vision_config={"model_type": "qwen2_5_vl_vision", "out_hidden_size": 5120},
    )  # fmt: skip
    return case


@architecture("aria")
def aria() -> Case:
    """Build an Aria. Its queries attend to the patches inside the projector."""
    config = tf.AriaConfig(
        text_config=TEXT | {"model_type": "aria_text", "moe_num_experts": 4, "moe_num_shared_experts": 1},
        vision_config=tf.Idefics3VisionConfig(**VISION),
        image_token_index=IMAGE_TOKEN,
        projector_patch_to_query_dict={4: 3},
    )
    batch = token_rows(1, 3) | {"pixel_values": pixels(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    case = Case(build(tf.AriaForConditionalGeneration, config), batch, _sites("model.multi_modal_projector"), words())
    text: dict[str, Any] = {
        "hidden_size": 2560, "intermediate_size": 1664, "num_hidden_layers": 28, "num_attention_heads": 20,
        "moe_num_experts": 64, "moe_topk": 6,
    }  # fmt: skip
    case.known = lambda: tf.AriaConfig(text_config=text)
    return case


@architecture("florence2")
def florence2() -> Case:
    """Build a Florence-2. Its language model is a BART, whose encoder and decoder have their own embedding modules
    over one table."""
    text = tf.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [8, VISION_WIDTH], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 2, "drop_path_rate": 0.0, "projection_dim": WIDTH, "max_position_embeddings": 4,
        "max_temporal_embeddings": 4,
    }  # fmt: skip
    config = tf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    batch = token_rows(1, 5) | {"pixel_values": pixels(2, 3, 16, 16)}  # the mean of the patches, then 2 x 2 patches
    batch["labels"] = torch.tensor([[5, 6, 2], [7, 8, 2]])
    sites = _sites("model.multi_modal_projector")
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    sites["text"] = [f"model.language_model.{name}" for name in names]
    case = Case(build(tf.Florence2ForConditionalGeneration, config), batch, sites, words())
    base = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    case.known = lambda: tf.Florence2Config(
        text_config=tf.BartConfig(**base, **heads), vision_config={"projection_dim": 768}
    )
    return case


@architecture("llama4")
def llama4() -> Case:
    """Build a Llama 4. Its tower has an adapter of its own before the projector, at the tower's width."""
    config = tf.Llama4Config(
        text_config=TEXT
        | {
            "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 4, "moe_layers": [1],
            "no_rope_layer_interval": 2, "attention_chunk_size": 16,
        },
        vision_config=VISION
        | {
            "image_size": 4 * PATCH, "intermediate_size": 4 * VISION_WIDTH, "vision_output_dim": 24,
            "projector_input_dim": 24, "projector_output_dim": 24,
        },
        image_token_index=IMAGE_TOKEN,
        boi_token_index=57,
        eoi_token_index=58,
    )  # fmt: skip
    batch = token_rows(1, 4, around=(57, 58)) | {"pixel_values": pixels(2, 3, 4 * PATCH, 4 * PATCH)}
    model = build(tf.Llama4ForConditionalGeneration, config)
    # model.to(dtype) would cast this complex table to a real type and break the tower, where a model loaded in
    # that type keeps it. It holds no weights: not being a buffer spares it.
    rotary = model.vision_model.rotary_embedding
    table = rotary.freqs_ci.clone()
    del rotary.freqs_ci
    rotary.freqs_ci = table
    sites = {"text": ["language_model.model.embed_tokens"], "vision": ["multi_modal_projector"]}
    return Case(model, batch, sites, words())


@architecture("kimi_k25")
def kimi_k25() -> Case:
    """Build a Kimi K2.5. It looks up token 0 in place of an image token."""
    text = TEXT | {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    config = tf.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3"} | text,
        vision_config=vision | {"pos_emb_height": 4, "pos_emb_width": 4},
        projection_hidden_size=VISION_WIDTH,
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
        vision_start_token_id=57,
        vision_end_token_id=58,
    )
    batch = image_rows() | {"pixel_values": pixels(2 * 16, 3, PATCH, PATCH)}
    del batch["mm_token_type_ids"]
    return Case(build(tf.Kimi_K25ForConditionalGeneration, config), batch, _sites("model.mm_projector"), words())


@architecture("step3p7")
def step3p7() -> Case:
    """Build a Step 3.7. Its projector runs twice, on the whole image and on the crops."""
    text = TEXT | {
        "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16,
        "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "share_expert_dim": 16,
    }  # fmt: skip
    config = tf.Step3p7Config(
        text_config=text,
        vision_config=VISION | {"image_size": 8 * PATCH, "mlp_ratio": 2.0, "max_position_embeddings": 64},
        image_token_id=IMAGE_TOKEN,
    )
    batch = token_rows(1, 1 + 4) | {
        "pixel_values": pixels(2, 3, 8 * PATCH, 8 * PATCH),
        "pixel_values_local": pixels(2, 3, 4 * PATCH, 4 * PATCH),
        "num_local_patches": torch.tensor([1, 1]),
    }
    model = build(tf.Step3p7ForConditionalGeneration, config)
    return Case(model, batch, _sites("model.multi_modal_projector"), words())


@architecture("lfm3_vl")
def lfm3_vl() -> Case:
    """Build an LFM3-VL. Images and videos share one projector, which merges blocks of patches."""
    config = tf.Lfm3VlConfig(
        text_config={"model_type": "lfm3"}
        | TEXT
        | {"head_dim": 16, "layer_types": ["conv", "full_attention"], "sliding_window": 16},
        vision_config={key: value for key, value in VISION.items() if key != "image_size"}
        | {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        projector_hidden_size=24,
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
        vision_start_token_id=57,
        vision_end_token_id=58,
    )
    batch = image_rows()
    del batch["mm_token_type_ids"]
    model = build(tf.Lfm3VlForConditionalGeneration, config)
    return Case(model, batch, _sites("model.multi_modal_projector"), words())


@architecture("mistral_large4")
def mistral_large4() -> Case:
    text = TEXT | {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "index_topk": 32, "index_head_dim": 16,
        "index_n_heads": 2, "no_rope_layers": [1, 0],
    }  # fmt: skip
    config = tf.MistralLarge4Config(
        text_config=text,
        vision_config={"model_type": "pixtral"} | VISION | {"image_size": 4 * PATCH, "head_dim": 8},
        image_token_index=IMAGE_TOKEN,
    )
    batch = token_rows(1, 4) | {
        "pixel_values": pixels(2, 3, 4 * PATCH, 4 * PATCH),
        "image_sizes": torch.tensor([[4 * PATCH, 4 * PATCH]] * 2),
    }
    model = build(tf.MistralLarge4ForConditionalGeneration, config)
    return Case(model, batch, _sites("model.multi_modal_projector"), words())


@architecture("mllama")
def mllama() -> Case:
    """Build an Mllama. Its cross-attention layers read the projector's output, and its image token has a table row
    after the vocabulary."""
    config = tf.MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1]} | rope({"rope_type": "default", "rope_theta": 1e4}),
        vision_config=VISION
        | {
            "num_global_layers": 1, "intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * VISION_WIDTH,
            "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=VOCABULARY,
    )  # fmt: skip
    batch = token_rows(1, 1, token=VOCABULARY)
    tiles = torch.tensor([[[1, 0]], [[1, 1]]])  # an image of one tile, and one of two
    attended = tiles[:, None].repeat(1, batch["input_ids"].shape[1], 1, 1)
    attended[:, 0] = 0  # what comes before the image does not see it
    batch |= {
        "pixel_values": pixels(2, 1, 2, 3, IMAGE_SIZE, IMAGE_SIZE),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": attended,
    }
    model = build(tf.MllamaForConditionalGeneration, config)
    for parameter in model.parameters():
        if parameter.numel() == 1:  # gates, closed at first: nothing seen would reach the logits
            torch.nn.init.constant_(parameter, 0.5)
    return Case(model, batch, _sites("model.multi_modal_projector"), words())


@architecture("nemotron_h_omni")
def nemotron_h_omni() -> Case:
    """Build a Nemotron-H Omni. A RADIO tower and a Parakeet encoder come before a Mamba hybrid, each with
    a projector."""
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"} | {
        "layers_block_type": ["linear_attention", "full_attention", "moe"], "head_dim": 16, "ssm_state_size": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": VISION_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0,
        "patch_size": PATCH, "image_size": 4 * PATCH, "max_img_size": 4 * PATCH, "video_temporal_patch_size": 2,
    }  # fmt: skip
    sound: dict[str, Any] = {
        "hidden_size": VISION_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "conv_kernel_size": 3, "subsampling_conv_channels": 4, "num_mel_bins": 8, "max_position_embeddings": 16,
        "projection_hidden_size": 24, "projection_bias": False,
    }  # fmt: skip
    sound |= dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout"), 0.0)
    config = tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=sound,
        projector_hidden_size=24,
        vision_hidden_size=VISION_WIDTH,
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
        audio_token_id=AUDIO_TOKEN,
    )
    batch = token_rows(1, 4, around=(57, 58)) | {
        "pixel_values": pixels(2 * 16, 3 * PATCH * PATCH),
        "image_grid_hw": torch.tensor([[4, 4]] * 2),
    }
    batch = with_sound(batch, tokens=2, around=(55, 56), input_features=pixels(2, 16, 8))
    sites = {
        "text": ["language_model.model.embeddings"],
        "vision": ["multi_modal_projector"],
        "audio": ["embed_audio"],
    }
    case = Case(build(tf.NemotronH_Omni_Reasoning_V3, config), batch, sites, words())
    case.known = lambda: tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config={"hidden_size": 2688},
        audio_config={"projection_hidden_size": 4096, "projection_bias": False},
    )
    return case


@architecture("minimax_m3_vl")
def minimax_m3_vl() -> Case:
    config = tf.MiniMaxM3VLConfig(
        text_config=TEXT | {
            "head_dim": 16, "dense_intermediate_size": 32, "shared_intermediate_size": 16, "rotary_dim": 8,
            "num_local_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 8,
        },
        vision_config=VISION | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_index=IMAGE_TOKEN, video_token_index=59, projector_hidden_size=24,
    )  # fmt: skip
    batch = token_rows(1, 4) | {
        "pixel_values": pixels(2 * 16, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    sites = {"text": ["model.language_model.embed_tokens"], "vision": ["model.multi_modal_projector"]}
    model = finish(tf.MiniMaxM3SparseForConditionalGeneration, config)
    model.generation_config.suppress_tokens = [59, IMAGE_TOKEN]
    return Case(model, batch, sites, words())
