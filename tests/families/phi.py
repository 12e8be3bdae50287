"""Build a tiny Phi-4-multimodal, as in transformers.

The settings come from transformers' processor and the image processor's defaults. The chat template is that of
microsoft/Phi-4-multimodal-instruct. As in the conversion for transformers, it takes messages with parts.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import family
from .parts import TEXT, VISION, byte_level, image_processor, save, template


@family(
    "phi4_multimodal",
    "<|image|>",
    "<|end|>",
    audio=True,
    keeps_turns=False,
    auto_class="AutoModelForCausalLM",
    needs=("torchvision",),
)
def phi4_multimodal(directory: Path) -> None:
    """Build a Phi-4-multimodal. An image becomes the whole in 448 x 448 pixels and up to 36 tiles, with a token after
    each row. The template writes `<|endoftext|>` after the `<|end|>` of the last answer. The model has no separate
    language model inside."""
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = byte_level(
        roles, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        image_token="<|image|>", audio_token="<|audio|>",
    )  # fmt: skip
    images = image_processor("Phi4MultimodalImageProcessor", size={"height": 448, "width": 448}, dynamic_hd=36)
    sound = tf.Phi4MultimodalFeatureExtractor()
    processor = tf.Phi4MultimodalProcessor(images, sound, tokenizer, chat_template=template("phi4_multimodal"))
    end = tokenizer.eos_token_id
    config = tf.Phi4MultimodalConfig(
        **TEXT, vocab_size=len(tokenizer), pad_token_id=end, bos_token_id=end, eos_token_id=end,
        vision_config=VISION | {
            "image_size": 448, "crop_size": 448, "patch_size": 14, "image_token_id": tokenizer.image_token_id
        },
        audio_config={
            "hidden_size": 16, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "input_size": 80,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 4,
            "audio_token_id": tokenizer.audio_token_id,
        },
    )  # fmt: skip
    save(directory, "Phi4MultimodalForCausalLM", config, processor, end="<|end|>")
