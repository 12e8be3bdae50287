"""Save tiny random models in the layouts of Hub repositories that the README loads by name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.examples.tiny_llava import tokenizer

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}

# As SmolVLM's: <|im_start|> once, a role, the parts of a turn, and <end_of_utterance>.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def save_smolvlm(folder: Path) -> None:
    """Save the whole repository of a SmolVLM, which is an Idefics 3 with a Llama inside."""
    words = tokenizer()
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<|im_start|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    words.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    words.eos_token = "<end_of_utterance>"
    images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 28})
    Idefics3Processor(images, words, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    ids = words.convert_tokens_to_ids
    end = words.eos_token_id
    config = Idefics3Config(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "image_size": 28, "patch_size": 7, **LAYERS},
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=64, vocab_size=len(words), pad_token_id=0, eos_token_id=end, **LAYERS
        ),
        image_token_id=ids("<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)


def save_smollm(folder: Path) -> None:
    """Save a causal language model and its tokenizer."""
    words = tokenizer()
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=len(words), **LAYERS)
    LlamaForCausalLM(config).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    """Save a vision tower and its image processor."""
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, image_size=28, patch_size=14, **LAYERS)).save_pretrained(folder)
