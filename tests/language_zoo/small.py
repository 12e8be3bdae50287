"""Small configurations of language models. Sizes are set by their names, and some models need further settings."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

WIDTH, VOCABULARY = 32, 100
BY_SIZE = """
32: hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim lru_width
48: intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size mlp_hidden_size ffn_dim
48: n_inner d_ff dff dim_ff encoder_ffn_dim decoder_ffn_dim
16: moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
16: shared_intermediate_size expert_ffn_hidden_size moe_latent_size q_lora_rank
2: num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
2: num_encoder_layers num_blocks num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token
2: moe_topk moe_k top_k_experts zero_expert_num index_n_heads linear_num_key_heads num_memory_blocks
4: num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
4: num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts
4: moe_num_experts linear_num_value_heads rotary_dim mamba_dt_rank
8: head_dim d_kv dim_head attention_head_size kv_channels kv_lora_rank qk_nope_head_dim qk_rope_head_dim
8: v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_d_head mamba_d_state
8: mamba_num_heads mamba_head_dim ssm_state_size state_size chunk_size mamba_chunk_size adapter_rank
8: hidden_size_per_layer_input
1: n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_mamba_groups mamba_ngroups
1: n_groups num_mem_blocks bos_token_id
64: mamba_d_ssm attention_hidden_size sliding_window attention_window_size index_topk
100: vocab_size vocab_size_per_layer_input
256: max_position_embeddings n_positions n_ctx max_seq_len
0: pad_token_id
0.0: dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob embd_pdrop attn_pdrop resid_pdrop
0.0: dropout_rate activation_dropout emb_dropout attn_dropout hidden_dropout ff_dropout residual_dropout
"""
SIZES: dict[str, Any] = {
    name: float(size) if "." in size else int(size)
    for size, _, names in (line.partition(": ") for line in BY_SIZE.split("\n"))
    for name in names.split()
}
SIZES |= {"eos_token_id": 2, "mamba_expand": 2, "is_decoder": True, "attention_head_dim": 16, "n_mamba_heads": 2}

SAME_HEADS = {"num_key_value_heads": 4, "head_dim": None}  # latent attention has as many keys as queries
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
GLOBAL = {"head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2, "num_global_key_value_heads": 2}
OWN: dict[str, dict[str, Any]] = {  # what a model needs beside, or has not: None leaves a size out
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), SAME_HEADS),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), SAME_HEADS),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), HYBRID),
    "bailing_hybrid": HYBRID | SAME_HEADS,
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"head_dim": None},
    "gemma3n_text": SLIDING
    | {"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
    | {"intermediate_size": [48] * 4},
    "gemma4_text": SLIDING | GLOBAL | {"num_kv_shared_layers": 2},
    "gemma4_unified_text": SLIDING | GLOBAL,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": HYBRID | SAME_HEADS | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_key_value_heads": 4, "intermediate_size": None, "num_hidden_layers": None},
    "mamba2": {"num_heads": 8},
    "mpt": {"expansion_ratio": 2},
    "prophetnet": {"num_hidden_layers": None},
    "qwen4_exp_text": HYBRID
    | {"hc_lowrank": 8, "ple_layer_ids": [1], "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 2}
    | {"heads_per_ngram": 2, "ple_embed_dim": 32, "indexer_n_heads": 2, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "head_dim": None},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20}
    | {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "t5gemma": {
        part: {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "cross_attention_hidden_size": WIDTH}
        for part in ("encoder", "decoder")
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
NO_TEXT_MODEL = {  # model_type -> why the zoo has no case of it
    "blt": "reads bytes in patches by a model of its own",
    "cohere_compass_text": "an encoder of text",
    "gemma4_assistant": "guesses ahead for another model",
    "xlstm": "transformers' own kernel has no backward pass",
    "zamba2": "its kernels' sizes do not shrink",
}


def architectures() -> list[tuple[str, bool]]:
    """Return (model_type, whether it is seq2seq) of each model in transformers' two mappings that reads text alone."""
    found = []
    mappings = ((MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, False), (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, True))
    for mapping, seq2seq in mappings:
        found += [(name, seq2seq) for name in mapping if name not in NO_TEXT_MODEL and _is_text_model(name)]
    return found


def _is_text_model(name: str) -> bool:
    config = CONFIG_MAPPING[name]
    return name in ("dbrx", "t5gemma") or (not config.sub_configs and name not in ("git", "phi4_multimodal"))


def small_config(name: str, seq2seq: bool) -> PreTrainedConfig:
    """Return the architecture's configuration with a width of 32, two to four layers and 100 tokens."""
    config_class = CONFIG_MAPPING[name]
    given = {key: size for key, size in SIZES.items() if _has(config_class(), key)} | OWN.get(name, {})
    aliases = getattr(config_class, "attribute_map", {})
    given = {key: v for key, v in given.items() if v is not None and aliases.get(key, key) not in given.keys() - {key}}
    return config_class(**given, **({"decoder_start_token_id": 0} if seq2seq else {}))


def _has(config: PreTrainedConfig, key: str) -> bool:
    try:
        return hasattr(config, key)
    except RuntimeError:  # it varies by layer, as Gemma 4's head_dim
        return True
