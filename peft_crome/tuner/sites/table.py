"""Sites by architecture, for architectures that the rules of rules.py miss."""

from __future__ import annotations

# model_type -> branch -> last parts of the paths of its sites, for architectures that the rules miss. To add one,
# add a line. The rules find branches that a line does not name.
HOSTS: dict[str, dict[str, list[str]]] = {
    "crome_vlm": {"text": ["text_fusion"], "vision": ["vision_fusion"]},
    "qwen2_5_omni_thinker": {"audio": ["audio_tower.proj"]},
    "qwen3_omni_moe_thinker": {"audio": ["audio_tower.proj2"]},
    "muse_glimmer": {"vision": ["perception_emb_norm"]},
    "muse_spark": {"vision": ["perception_emb_norm"], "audio": ["audio_tower.post_proj_norm"]},
    "inkling_mm_model": {"vision": ["vision_tower.final_norm"], "audio": ["audio_tower.norm"]},
    "phi4_multimodal": {
        "vision": ["img_projection_down"],
        "audio": ["down_proj_for_speech", "down_proj_for_vision_speech"],
    },
    "ovis2": {"vision": ["visual_embeddings_table"]},
    "pix2struct": {"vision": ["encoder.layernorm"]},
    "pp_formulanet": {"text": ["decoder.embed_tokens"]},
    "vision-encoder-decoder": {"vision": ["enc_to_dec_proj"]},
    "udop": {"vision": ["encoder.embed_patches"]},
    "granite4_vision": {"vision": ["out_linear"]},
    "evolla": {"protein": ["sequence_compressor_resampler"]},
    "EvollaModel": {"protein": ["sequence_compressor_resampler"]},  # this is its model_type in transformers 4
}
