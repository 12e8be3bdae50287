"""Build tiny random backbones and batches without network access."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_crome.vlm import CromeVLMConfig, CromeVLMForConditionalGeneration

VOCABULARY = 100
IMAGE_ID = 100  # outside every embedding table
VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 30, "patch_size": 10}
FULL_VIT = {**VIT, "intermediate_size": 32}
STAGES = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TOWERS: dict[str, tuple[dict[str, Any], int, int]] = {  # name -> (configuration, prefix tokens, patches)
    "clip_vision_model": (FULL_VIT, 1, 9),
    "siglip_vision_model": (FULL_VIT, 0, 9),
    "vit": (FULL_VIT, 1, 9),
    "dinov2": (VIT, 1, 9),
    "dinov2_with_registers": ({**VIT, "num_register_tokens": 7}, 8, 9),
    "dinov3_vit": ({**FULL_VIT, "num_register_tokens": 4}, 5, 9),
    "dinov3_convnext": ({"image_size": 64, "hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1]}, 1, 4),
    "swin": (STAGES, 0, 64),
    "convnext": ({"image_size": 32, "num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1]}, 0, 16),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}, 0, 16),
    "instructblip_vision_model": (FULL_VIT, 1, 9),
}
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {**DECODER, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen2": {**DECODER, "num_key_value_heads": 2},
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "opt": {
        "word_embed_proj_dim": 16,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    },
}
SEQ2SEQ = ("t5", "bart")


def vision_config(name: str = "clip_vision_model") -> Any:
    """Return the configuration of a tiny tower."""
    return transformers.CONFIG_MAPPING[name](**TOWERS[name][0])


def text_config(name: str = "llama") -> Any:
    """Return the configuration of a tiny language model, without dropout."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    quiet = {"gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}}.get(name, {})
    return transformers.CONFIG_MAPPING[name](**LANGUAGE_MODELS[name], **tokens, **quiet)


def build(
    tower: str = "clip_vision_model", language: str = "llama", **kwargs: Any
) -> CromeVLMForConditionalGeneration:
    """Build a composite with random weights."""
    torch.manual_seed(0)
    if tower == "resnet":
        kwargs.setdefault("image_size", 32)
    config = CromeVLMConfig(
        vision_config=vision_config(tower), text_config=text_config(language), image_token_id=IMAGE_ID, **kwargs
    )
    return CromeVLMForConditionalGeneration(config).eval()


def make_batch(model: Any, *, images_per_row: tuple[int, ...] = (1, 0, 2), side: str = "left") -> dict[str, Any]:
    """Build rows with different numbers of images and words, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row, count in enumerate(images_per_row):
        ids = [1, 10 + row]
        for image in range(count):
            ids += [IMAGE_ID] * model.config.image_seq_length + [20 + image, 30 + row]
        rows.append(ids)
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(ids)) for ids in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, pads, strict=True)
    ]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if sum(images_per_row):
        shape = (sum(images_per_row), 3, *model.config.image_height_width)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
    return batch


def make_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each word from w0 to w89. It has an end token but no pad token, like many
    language models."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "user:": 3, "assistant:": 4, **{f"w{i}": i + 5 for i in range(90)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs
    )


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
