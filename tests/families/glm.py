"""Build a tiny GLM-4.1V, which transformers calls glm4v.

The settings come from transformers' `convert_glm4v_mgt_weights_to_hf.py` and processors, and from the
`preprocessor_config.json` of zai-org/GLM-4.1V-9B-Thinking. The form of the prompt comes from vLLM's examples.
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf

from .family import family
from .parts import TEXT, VISION_WIDTH, WIDTH, byte_level, image_processor, save, template

ROLES = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


@family("glm4v", "<|image|>", None, video=True, needs=("torchvision",))
def glm4v(directory: Path) -> None:
    """Build a GLM-4.1V. An image has one token for each 28 x 28 pixels, and at least 16. The template writes no token
    after an answer, and the model ends an answer with `<|user|>`."""
    kinds = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
    tokenizer = byte_level(
        [*ROLES, *kinds, "<|image|>", "<|video|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        padding_side="left",
    )  # fmt: skip
    images = image_processor("Glm4vImageProcessor", size={"shortest_edge": 12544, "longest_edge": 9633792})
    videos = tf.Glm4vVideoProcessor(size={"shortest_edge": 12544, "longest_edge": 47040000})
    processor = tf.Glm4vProcessor(images, tokenizer, videos, chat_template=template("glm4v"))
    ids = tokenizer.convert_tokens_to_ids
    tower = {
        "depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "hidden_size": VISION_WIDTH, "intermediate_size": 32, "out_hidden_size": WIDTH, "image_size": 336,
    }  # fmt: skip
    text = TEXT | {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "rope_theta": 1e4
        },
    }  # fmt: skip
    edges = {
        f"{kind}_{name}_token_id": ids(f"<|{edge}_of_{kind}|>")
        for kind in ("image", "video")
        for edge, name in (("begin", "start"), ("end", "end"))
    }
    config = tf.Glm4vConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        **edges,
    )
    save(directory, "Glm4vForConditionalGeneration", config, processor, end="<|user|>")
