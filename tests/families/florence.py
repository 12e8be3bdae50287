"""Build a tiny Florence-2, an encoder-decoder without a chat template. Its processor takes a task or a question.

The settings come from transformers' `convert_florence2_original_pytorch_to_hf.py` and the `preprocessor_config.json`
of florence-community/Florence-2-base.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import family
from .parts import WIDTH, byte_level, image_processor, save


@family(
    "florence2", "<image>", None, several_images=False, system=False, encoder_decoder=True, chat_template=False,
    trains="yes, with `--set chat_template=words`: it publishes no chat template",
)  # fmt: skip
def florence2(directory: Path) -> None:
    """Build a Florence-2. The image has 577 tokens before the prompt: the mean of the patches, then 24 x 24
    patches."""
    places = [f"<loc_{place}>" for place in range(1000)]
    tokenizer = byte_level(
        places, starts_with_bos=True, ends_with_eos=True, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", image_token="<image>",
    )  # fmt: skip
    images = image_processor(
        "CLIPImageProcessor", size={"height": 768, "width": 768}, crop_size={"height": 768, "width": 768},
        do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    images.image_seq_length = 577
    processor = tf.Florence2Processor(images, tokenizer)
    text = tf.BartConfig(
        vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=tokenizer.eos_token_id, dropout=0.1,
    )  # fmt: skip
    vision = {
        "depths": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2],
        "projection_dim": WIDTH,
    }  # fmt: skip
    config = tf.Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    save(directory, "Florence2ForConditionalGeneration", config, processor)
