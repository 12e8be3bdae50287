"""Build the quick start's composite: frozen DINOv2-small and SmolLM2-135M, joined, with one of several methods."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch.utils.benchmark import Timer
from transformers import BitsAndBytesConfig

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor

from .parts import cache_dir, dinov2_small, easy_vqa_dir, smollm2

METHODS = ("crome", "crome-both", "lora", "projection", "crome-both-4bit")
WIDE = 848  # bottleneck of "crome-wide", a trial: twice the default's
PROJECTION = "image_projection"
POOL_SIZE = 2  # 8 x 8 patches of a 112 px image -> 16 image tokens


def processor() -> Any:
    """Build the composite's processor: DINOv2's images, SmolLM2's chat template."""
    return CromeVLMProcessor.from_backbones(config=backbone("projection").config)


@cache
def frozen_dtype() -> torch.dtype:
    """Return the dtype of the frozen backbones: bfloat16, or float32 if this machine multiplies faster in it.

    A CPU without AMX and AVX-512 BF16 took four times as long in bfloat16.
    """
    if torch.cuda.is_available():
        return torch.bfloat16
    squares = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    timers = {dtype: Timer("a @ a", globals={"a": square}) for dtype, square in squares.items()}
    return min(timers, key=lambda dtype: timers[dtype].blocked_autorange(min_run_time=0.1).median)


def nf4() -> BitsAndBytesConfig:
    """Return QLoRA's 4-bit configuration, computed in the dtype that is fast on this machine."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=frozen_dtype(),
    )


def composite(
    dtype: torch.dtype | None = None, in_nf4: bool = False, language: Path | None = None, **options: Any
) -> CromeVLMForConditionalGeneration:
    """Join frozen DINOv2-small and a language model; 16 tokens per image.

    Args:
        dtype: None: the dtype that is fast on this machine.
        in_nf4: whether to quantize the language model to nf4.
        language: directory of the language model; None: SmolLM2-135M.
        options: further arguments of `from_backbones`.
    """
    return CromeVLMForConditionalGeneration.from_backbones(
        vision=str(dinov2_small()),
        language=str(language or smollm2()),
        quantization_config=nf4() if in_nf4 else None,
        dtype=dtype or frozen_dtype(),
        vision_pool_size=POOL_SIZE,
        **options,
    )


def backbone(method: str, dtype: torch.dtype | None = None) -> CromeVLMForConditionalGeneration:
    """Load both frozen backbones (the language model in nf4 for "crome-both-4bit") and a new projection in fp32.

    Without `dtype` the backbones get the dtype that is fast on this machine.
    """
    return _to_train(composite(dtype, in_nf4=method == "crome-both-4bit"))


def _to_train(model: CromeVLMForConditionalGeneration) -> CromeVLMForConditionalGeneration:
    model.image_projection.float()
    # On a CPU, fused attention has a slow backward pass in PyTorch: 0.81 s a step, 0.58 s with plain products.
    if not torch.cuda.is_available():
        model.language_model.set_attn_implementation("eager")
    return model


def adapter_config(method: str, stage: str) -> PeftConfig | None:
    """Return the PEFT configuration of a stage; None if only the projection trains."""
    projection = [PROJECTION] if stage == "align" else None
    if method == "projection":
        return None
    if method == "lora":
        # 748,800 weights, 2.2% more than CROME's 732,672. The regex spares the tower: its layers have the same names.
        target = r".*language_model.*\.(q_proj|v_proj)"
        return LoraConfig(r=13, lora_alpha=26, target_modules=target, modules_to_save=projection)
    branches = ["text", "vision"] if method in ("crome-both", "crome-both-4bit") else None
    width = WIDE if method == "crome-wide" else None
    return CromeConfig(branches=branches, bottleneck_dim=width, modules_to_save=projection)


def attach(method: str, stage: str, previous: Path | None = None) -> torch.nn.Module:
    """Build the trainable model of a stage: "align" from scratch, "finetune" from the directory of "align"."""
    if previous is None:
        model = backbone(method)
    else:
        model = _to_train(CromeVLMForConditionalGeneration.from_pretrained(previous / "composite"))
    config = adapter_config(method, stage)
    if config is None:
        return model
    model = get_peft_model(model, config)
    if previous is not None:
        weights = load_peft_weights(str(previous / "adapter"), device="cpu")
        own = {name: value for name, value in weights.items() if PROJECTION not in name}
        set_peft_model_state_dict(model, own)
    return model


def save_stage(model: torch.nn.Module, directory: Path) -> int:
    """Write the stage's directory: `adapter/` (PEFT) and `composite/` (the projection); return the size in bytes."""
    if isinstance(model, PeftModel):
        model.save_pretrained(directory / "adapter")
        model = model.unload()  # keeps the trained projection in the plain composite
    model.save_pretrained(directory / "composite")
    files = [file for part in ("adapter", "composite") for file in (directory / part).glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


def load_stage(directory: Path) -> torch.nn.Module:
    """Load the trained model of a stage for answering, from its directory and the backbones that it names."""
    model: torch.nn.Module = CromeVLMForConditionalGeneration.from_pretrained(directory / "composite")
    if (directory / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, str(directory / "adapter"))
    return model.eval()


def vision_features(split: str, image_processor: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute the frozen tower's pooled features of a split's images, (images, 16, 384) fp16, once.

    `dtype` is the tower's dtype, as in `backbone`.
    """
    folder = easy_vqa_dir() / split / "images"
    count = len(list(folder.glob("*.png")))
    return cached_features(Images(split, count, lambda i: Image.open(folder / f"{i}.png")), image_processor, dtype)


@dataclass(frozen=True)
class Images:
    """A set of images whose features are cached.

    Args:
        name: name of the cache file, different for each set.
        count: number of images.
        image: function that returns image i.
    """

    name: str
    count: int
    image: Callable[[int], Image.Image]


def cached_features(images: Images, image_processor: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute the frozen tower's pooled features of some images, (images, 16, 384) fp16, once, and cache them.

    `dtype` is the tower's dtype, as in `backbone`.
    """
    dtype = dtype or frozen_dtype()
    held = str(dtype).removeprefix("torch.")
    path = cache_dir() / f"features-{images.name}-{dinov2_small().name}-112px-pool{POOL_SIZE}-{held}.safetensors"
    with FileLock(path.with_suffix(".lock")):  # minutes of work, which another process may be doing
        if not path.is_file():
            model = backbone("projection", dtype).eval()
            batches = []
            for first in track(
                range(0, images.count, 50), description=f"features of {images.count} {images.name} images"
            ):
                batch = [images.image(i).convert("RGB") for i in range(first, min(first + 50, images.count))]
                pixel_values = image_processor(batch, return_tensors="pt")["pixel_values"]
                batches.append(model.get_vision_features(pixel_values).half())
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": torch.cat(batches)}, temporary)
            os.replace(temporary, path)
    return load_file(path)["features"]


def blank_features(image_processor: Any) -> torch.Tensor:
    """Compute the tower's pooled features of one black image, (1, 16, 384) fp16."""
    image = Image.new("RGB", (64, 64))
    pixel_values = image_processor([image], return_tensors="pt")["pixel_values"]
    return backbone("projection").eval().get_vision_features(pixel_values).half()
