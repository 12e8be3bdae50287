"""Build tiny checkpoints for vLLM's CPU engine, as their families publish them, with adapters of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_crome import CromeConfig
from peft_crome.serving import export
from tests.families import FAMILIES, gemma, parts
from tests.families.conversations import picture, render, turn

HEAD = 32  # the least that vLLM's attention takes on a CPU
# Here an image's tokens read those behind them, and vLLM's attention on a CPU does not let them. The logits of the
# host alone differ by up to 0.3 from those of transformers.
OTHER_LOGITS = ("gemma3", "paligemma")
HOSTS = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl",
    "mistral3", "glm4v", "pixtral",
)  # fmt: skip
ONE_TILE = {"internvl": {"crop_to_patches": False}, "idefics3": {"do_image_splitting": False}}
ONE_TILE["smolvlm"] = ONE_TILE["idefics3"]
SIZES = ((140, 100), (90, 200))  # of the images that hosts are asked about
TOKENS = 16
CLOSE = 1e-3  # two logits, of random weights, that are of order 1


def build_host(name: str, folder: Path) -> None:
    """Write a family's tiny checkpoint, with heads that vLLM takes and the weights' names on the Hub."""
    random_model, tokenizer = parts.random_model, gemma.gemma_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "random_model", lambda kind, config: random_model(kind, _with_one_head(config)))
        line_feeds = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]  # vLLM looks them up, for Gemma 3
        patch.setattr(gemma, "gemma_tokenizer", lambda specials, **named: tokenizer([*specials, *line_feeds], **named))
        FAMILIES[name].build(folder)
    if tf.AutoConfig.from_pretrained(folder).vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        for path in folder.glob("*.safetensors"):
            weights = load_file(path)
            save_file({_published(key): weight for key, weight in weights.items()}, path, metadata={"format": "pt"})


def _published(key: str) -> str:
    """Return a weight's name on the Hub. A model that was made from a bare configuration is saved without
    `vision_model`."""
    return key if "vision_model." in key else key.replace("vision_tower.", "vision_tower.vision_model.")


def _with_one_head(config: Any) -> Any:
    text = config.get_text_config()
    text.num_attention_heads = text.num_key_value_heads = 1
    for name in ("head_dim", "query_pre_attn_scalar"):
        if hasattr(text, name):
            setattr(text, name, HEAD)
    rope = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope:  # a new dictionary, since families share this one
        text.rope_parameters = {**rope, "mrope_section": [2 * size for size in rope["mrope_section"]]}
    return config


def load_host(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the host with transformers."""
    return tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


@dataclass(frozen=True)
class Exported:
    """A host with adapters in transformers, its processor, and the folders of the host alone and of the export."""

    model: PeftModel
    processor: Any
    host: Path
    served: Path


def exported(name: str, folder: Path, adapters: Sequence[str] = ("default",), **arguments: Any) -> Exported:
    """Build a host with adapters, save the adapters in `folder`, and export the model. The export has the host's files
    by default."""
    host, served = folder / "host", folder / "served"
    build_host(name, host)
    model = save_adapters(load_host(host), folder / "adapters", adapters)
    export(model, served, **{"host": host, **arguments})
    return Exported(model, tf.AutoProcessor.from_pretrained(host), host, served)


def save_adapters(host: Any, folder: Path, names: Sequence[str], **settings: Any) -> PeftModel:
    """Put adapters of random weights on a host, and save each to a folder of its name."""
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = CromeConfig(bottleneck_dim=8, init_weights=False, **settings)
        if seed == 0:
            model = get_peft_model(host, config, name)
        else:
            model.add_adapter(name, config)
    for linear in [part for key, part in model.named_parameters() if ".crome." in key]:
        linear.data.mul_(2)  # so that tokens differ
    model.eval()
    for name in names:
        model.save_pretrained(folder, selected_adapters=[name])
    return model


def conversations() -> list[list[dict[str, Any]]]:
    """Return a question about each of two images."""
    return [[turn("user", picture(*size), "What color is this?")] for size in SIZES]


def without_template(processor: Any) -> bool:
    """Return whether a processor takes a prompt in place of a conversation, as PaliGemma's does."""
    return not (processor.chat_template or processor.tokenizer.chat_template)


def prompt_of(conversation: list[dict[str, Any]]) -> str:
    """Return the prompt for a processor without a chat template."""
    return "<image>" + conversation[0]["content"][1]["text"]


def request_of(processor: Any, conversation: list[dict[str, Any]]) -> dict[str, Any]:
    """Return vLLM's request. A rendered conversation is passed as tokens, since vLLM adds a second `<bos>` to a text
    that begins with one."""
    image = {"multi_modal_data": {"image": conversation[0]["content"][0]["image"]}}
    if without_template(processor):
        return {"prompt": prompt_of(conversation), **image}
    text = render(processor, conversation, add_generation_prompt=True, tokenize=False)
    begins = text.startswith(processor.tokenizer.bos_token or "\0")
    tokens = processor.tokenizer(text, add_special_tokens=not begins)["input_ids"]
    return {"prompt_token_ids": tokens, **image}


def inputs_of(processor: Any, conversation: list[dict[str, Any]], **options: Any) -> Any:
    """Return the inputs for transformers."""
    if without_template(processor):
        images = [[conversation[0]["content"][0]["image"]]]
        return processor(images=images, text=[prompt_of(conversation)], return_tensors="pt")
    options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return render(processor, conversation, **options)


@torch.no_grad()
def generated(model: Any, inputs: Any, close: float = CLOSE, **arguments: Any) -> list[int]:
    """Return the greedy tokens of `generate`, up to the first whose two best logits could be swapped by rounding."""
    inputs = inputs.to(model.dtype)
    output = model.generate(
        **inputs, **arguments, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, num_beams=1,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return until_close(output, inputs["input_ids"].shape[1], close)[0]


def until_close(output: Any, prompt: int, close: float = CLOSE) -> list[list[int]]:
    """Return each row's tokens of `generate`, up to the first whose two best logits are closer than `close`."""
    best = torch.stack([scores.float().topk(2).values for scores in output.scores], dim=1)  # (rows, tokens, 2)
    sure = ((best[..., 0] - best[..., 1]) >= close).int().cumprod(dim=1).sum(dim=1).tolist()
    return [row[:count] for row, count in zip(output.sequences[:, prompt:].tolist(), sure, strict=True)]


def agree(found: list[list[int]], expected: list[list[int]]) -> list[str]:
    """Return "equal" for each row, or the number of its first token that differs. Only tokens that both lists have are
    compared."""
    pairs = [list(zip(*rows, strict=False)) for rows in zip(found, expected, strict=True)]
    return [next((str(i + 1) for i, pair in enumerate(row) if pair[0] != pair[1]), "equal") for row in pairs]


def all_equal(found: list[list[int]], expected: list[list[int]]) -> bool:
    """Return whether all rows agree, and each expected row has at least two tokens."""
    return agree(found, expected) == ["equal"] * len(expected) and all(len(row) > 1 for row in expected)
