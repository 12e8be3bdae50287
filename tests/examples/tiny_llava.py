"""Write a tiny random LLaVA with a complete processor to disk, and questions about images in easy-VQA's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLORS, SHAPES = ("teal", "red", "blue", "black"), ("circle", "rectangle")
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
IMAGE_SIZE, PATCH_SIZE, WIDTH, LAYERS = 28, 7, 32, 2

# As LLaVA-1.5's: a role, images first, text with a space after it, and no end of turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def save_tokenizer_and_model(folder: Path) -> None:
    """Write the files that `AutoProcessor` and `AutoModelForImageTextToText` load from `folder`."""
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(processor.tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=SPECIAL.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that is trained on a few sentences, with the names of Llama's special
    tokens."""
    text = [f"What color is the {shape}? {color} USER: ASSISTANT: yes no" for shape in SHAPES for color in COLORS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        model_input_names=["input_ids", "attention_mask"],
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
    )


def save_questions(folder: Path) -> None:
    """Write `questions.json` with rows of question, answer and image id, and the images as `images/<image id>.png`."""
    (folder / "images").mkdir(parents=True)
    questions = []
    for image_id, (color, shape) in enumerate((color, shape) for color in COLORS for shape in SHAPES):
        image = Image.new("RGB", (64, 64), "white")
        paint = ImageDraw.Draw(image)
        (paint.ellipse if shape == "circle" else paint.rectangle)((16, 16, 48, 48), fill=color)
        image.save(folder / "images" / f"{image_id}.png")
        questions += [[f"What color is the {shape}?", color, image_id], [f"Is there a {shape}?", "yes", image_id]]
    (folder / "questions.json").write_text(json.dumps(questions))
