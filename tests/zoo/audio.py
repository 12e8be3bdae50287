"""Builders of hosts with audio: Qwen2-Audio, Voxtral, Audio Flamingo, GLM-ASR, Qwen3-ASR, Granite Speech
and Phi-4-multimodal."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .case import (
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    TEXT,
    VISION,
    WIDTH,
    Batch,
    Case,
    architecture,
    finish,
    pixels,
    token_rows,
    words,
)

MELS, FRAMES = 8, 16
WHISPER: dict[str, Any] = {
    "num_mel_bins": MELS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_source_positions": FRAMES // 2,
}  # fmt: skip
SITES = {"text": ["model.language_model.embed_tokens"], "audio": ["model.multi_modal_projector"]}


def sound_rows(tokens: int, **extra: torch.Tensor) -> Batch:
    """Build two rows, each with one sound of 16 frames and two words."""
    return token_rows(1, tokens, token=AUDIO_TOKEN) | {"input_features": pixels(2, MELS, FRAMES)} | extra


def _heard(config: Any, model_class: type, batch: Batch, sites: dict[str, list[str]] = SITES, **known: Any) -> Case:
    model = finish(model_class, config)
    model.generation_config.suppress_tokens = list(range(53, AUDIO_TOKEN + 1))
    return Case(model, batch, sites, words(), known=(lambda: type(config)(**known)) if known else None)


def all_frames() -> torch.Tensor:
    return torch.ones(2, FRAMES, dtype=torch.long)


@architecture("qwen2_audio")
def qwen2_audio() -> Case:
    config = tf.Qwen2AudioConfig(
        audio_config=WHISPER | {"model_type": "qwen2_audio_encoder"},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_index=AUDIO_TOKEN,
    )
    batch = sound_rows(4, feature_attention_mask=all_frames())
    return _heard(config, tf.Qwen2AudioForConditionalGeneration, batch)


@architecture("voxtral")
def voxtral() -> Case:
    config = tf.VoxtralConfig(
        audio_config=WHISPER | {"model_type": "voxtral_encoder"},
        text_config=TEXT | {"model_type": "llama", "head_dim": 16},
        audio_token_id=AUDIO_TOKEN,
    )
    return _heard(config, tf.VoxtralForConditionalGeneration, sound_rows(2))


@architecture("audioflamingo3")
def audioflamingo3() -> Case:
    config = tf.AudioFlamingo3Config(
        audio_config=WHISPER | {"model_type": "audioflamingo3_encoder"},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_id=AUDIO_TOKEN,
    )
    batch = sound_rows(4, input_features_mask=all_frames())
    known = {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    return _heard(config, tf.AudioFlamingo3ForConditionalGeneration, batch, text_config=known)


@architecture("glmasr")
def glmasr() -> Case:
    config = tf.GlmAsrConfig(
        audio_config=WHISPER | {"model_type": "glmasr_encoder"},
        text_config=TEXT | {"model_type": "llama"},
        audio_token_id=AUDIO_TOKEN,
    )
    return _heard(config, tf.GlmAsrForConditionalGeneration, sound_rows(2, input_features_mask=all_frames()))


@architecture("qwen3_asr")
def qwen3_asr() -> Case:
    """Build a Qwen3-ASR. Its encoder packs chunks of 100 frames into one row, and each chunk gives 13 tokens."""
    audio = {key: value for key, value in WHISPER.items() if key != "max_source_positions"} | {
        "model_type": "qwen3_asr_encoder", "output_dim": WIDTH, "downsample_hidden_size": 4,
    }  # fmt: skip
    text = TEXT | {"model_type": "qwen3", "head_dim": 16}
    config = tf.Qwen3ASRConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_TOKEN)
    batch = sound_rows(13, input_features_mask=torch.ones(2, 100, dtype=torch.long))
    batch["input_features"] = pixels(2, MELS, 100)
    known = {"model_type": "qwen3_asr_encoder", "output_dim": 2048}
    return _heard(config, tf.Qwen3ASRForConditionalGeneration, batch, audio_config=known)


@architecture("granite_speech")
def granite_speech() -> Case:
    """Build a Granite Speech. Its projector is a window Q-Former, and its configuration names the tower `encoder`
    instead of `audio`."""
    config = tf.GraniteSpeechConfig(
        encoder_config={
            "input_dim": MELS, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 4, "context_size": 8,
            "max_pos_emb": 8, "conv_kernel_size": 3, "feedforward_mult": 2,
        },
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "cross_attention_frequency": 1, "encoder_hidden_size": 16,
        },
        text_config=TEXT | {"model_type": "granite"},
        audio_token_index=AUDIO_TOKEN, downsample_rate=2, window_size=4, has_lora_adapter=False,
    )  # fmt: skip
    batch = sound_rows(4) | {"input_features": pixels(2, 8, MELS), "input_features_mask": torch.ones(2, 4).bool()}
    sites = SITES | {"audio": ["model.projector"]}
    known = {"model_type": "granite", "hidden_size": 2048}
    return _heard(config, tf.GraniteSpeechForConditionalGeneration, batch, sites, text_config=known)


@architecture("phi4_multimodal")
def phi4_multimodal() -> Case:
    """Build a Phi-4-multimodal. Its projections have no module around them, and sound has a second one for prompts
    that also have an image."""
    config = tf.Phi4MultimodalConfig(
        **TEXT,
        vision_config=VISION | {"image_size": 16, "crop_size": 16, "image_token_id": IMAGE_TOKEN},
        audio_config={
            "hidden_size": 16, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "input_size": MELS,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "time_reduction": 4,
            "nemo_conv_channels": 4, "audio_token_id": AUDIO_TOKEN,
        },
    )  # fmt: skip
    # 2 x 2 tokens of a crop and of the whole, a newline for each of their rows, and one between the two.
    image, sound = [IMAGE_TOKEN] * 13, [AUDIO_TOKEN] * 4
    ids = torch.tensor([[1, *image, *sound, 5, 6], [1, *image, *sound, 7, 8]])
    labels = ids.clone()
    labels[:, :-2] = -100
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "image_pixel_values": pixels(2, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * 2),
        "image_attention_mask": torch.ones(2, 2, 4, 4),
        "audio_input_features": pixels(2, FRAMES, MELS),
        "audio_embed_sizes": torch.tensor([4, 4]),
    }
    where = "model.embed_tokens_extend"
    sites = {
        "text": ["model.embed_tokens"],
        "vision": [f"{where}.image_embed.img_projection_down"],
        "audio": [f"{where}.audio_embed.down_proj_for_{mode}" for mode in ("speech", "vision_speech")],
    }
    return _heard(config, tf.Phi4MultimodalForCausalLM, batch, sites)
