"""Build frozen vision-language models with random weights on their device, without downloads."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from benchmarks.devices import settle
from peft_crome.backbone.four_bit import REPACKS

DTYPE = torch.bfloat16
CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A LLaVA and the work to measure on it.

    Args:
        name: name in the tables.
        vision: CLIP's configuration.
        text: the language model's configuration.
        rows, tokens: size of a training step.
        prompt, decoded: tokens of the single row to decode.
        batch, read, more: rows of a batch of many adapters, tokens of their prompts, and tokens to decode.
        adapters: numbers of different adapters in this batch.
        small_image: size in pixels of that batch's images, so that its prompts are short.
        repeats: largest number of repeats of each way.
        frozen: formats of the frozen weights: "bf16", and "nf4" if that is measured as well.
        share: share of the time, relative to other shapes.
    """

    name: str
    vision: dict[str, Any]
    text: Any
    rows: int
    tokens: int
    prompt: int
    decoded: int
    batch: int
    read: int
    more: int
    adapters: tuple[int, ...]
    small_image: int
    repeats: int = 15
    frozen: tuple[str, ...] = ("bf16",)
    share: float = 1.0


SHAPES = {
    "7b": Shape(
        name="LLaVA-1.5-7B",
        vision=CLIP_LARGE,
        text=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
        rows=4, tokens=1024, prompt=640, decoded=32,
        batch=256, read=96, more=8, adapters=(1, 8, 64, 256), small_image=112, frozen=("bf16", "nf4"), share=2.0,
    ),
    "0.5b": Shape(
        name="LLaVA with Qwen2-0.5B",
        vision=CLIP_LARGE,
        text=Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        ),
        rows=2, tokens=1024, prompt=640, decoded=32,
        batch=256, read=96, more=8, adapters=(1, 8, 64, 256), small_image=112,
    ),
    "tiny": Shape(
        name="a tiny LLaVA",
        vision={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        text=LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        ),
        rows=2, tokens=32, prompt=16, decoded=4,
        batch=4, read=12, more=2, adapters=(1, 4), small_image=14, repeats=2, frozen=("bf16", "nf4"),
    ),
}  # fmt: skip


def configuration(shape: Shape, image_size: int) -> LlavaConfig:
    """Configure a LLaVA whose second to last word is the image placeholder."""
    vision = CLIPVisionConfig(**{**shape.vision, "image_size": image_size})
    text = copy.deepcopy(shape.text)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size - 2,
        image_seq_length=(image_size // vision.patch_size) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def build(shape: Shape, device: str, frozen: str = "bf16", image_size: int | None = None) -> nn.Module:
    """Build a frozen LLaVA of this shape on the device.

    Args:
        frozen: "bf16", or "nf4" for the language model's layers in 4 bits.
        image_size: size in pixels; None: the shape's.
    """
    torch.manual_seed(0)
    config = configuration(shape, image_size or shape.vision["image_size"])
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=DTYPE)
    model.requires_grad_(False)
    if frozen == "nf4":
        quantize(model, device)
    return model.eval()


def quantize(model: Any, device: str) -> None:
    """Quantize the language model's linear layers to 4 bits one by one on the device, as QLoRA does."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # imported only here: the rest runs without it

    kind = {"compress_statistics": True, "quant_type": "nf4"}
    decoder = model.get_decoder()
    for path, layer in list(decoder.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        packed = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=DTYPE, device="meta", **kind
        )
        setattr(packed, REPACKS, False)  # on a CPU, since other models share the weights
        weight = Params4bit(layer.weight.data, requires_grad=False, module=packed, **kind)
        packed.weight, packed.bias = weight.to(device), layer.bias
        decoder.set_submodule(path, packed)
    model.is_loaded_in_4bit = True  # PEFT reads it when it attaches LoRA


def share(model: nn.Module) -> Any:
    """Make another model of the same frozen weights, so that attaching to it leaves the first one unchanged."""
    memo = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def compile_layers(model: Any) -> Any:
    """Compile each layer of the language model. The layers share one graph, which takes seconds and not minutes.

    On a CPU no kernels are generated, which would need a C++ compiler.
    """
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager" if model.device.type == "cpu" else "inductor")
    return model


class Hosts:
    """Keep only the model that was requested last, so that a device holds one at a time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.key: tuple[Any, ...] = ()
        self.model: Any = None

    def get(self, size: str, frozen: str, image_size: int | None = None) -> Any:
        """Return the frozen model, and build it unless it is the last one."""
        key = (size, frozen, image_size)
        if key != self.key:
            self.key, self.model = (), None
            settle(self.device)
            self.model = build(SHAPES[size], self.device, frozen, image_size)
            self.key = key
        return self.model
