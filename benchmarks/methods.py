"""Methods that the speed benchmarks compare: the frozen model alone, the adapter, and PEFT's other methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks.variants import ALL_LINEAR, IA3, LANGUAGE, PROMPT, SOFT_TOKENS
from examples.easy_vqa.model import composite
from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from peft_crome.tuner.sites.find import find_branches

FLOOR = "frozen model alone"
CROME = "CROME"
BOTH = ["text", "vision"]  # CROME's full cost: the default has no text branch and costs less
FIRST_WORD, LAST_WORD = 20, 2000  # random text of ordinary tokens
IGNORED = -100

CONFIGS: dict[str, PeftConfig | None] = {
    FLOOR: None,
    CROME: CromeConfig(branches=BOTH),
    "LoRA r=8 on q, v": LoraConfig(r=8, target_modules=f"{LANGUAGE}(q_proj|v_proj)"),
    "LoRA r=16 on all linear layers": LoraConfig(r=16, target_modules=f"{LANGUAGE}({ALL_LINEAR})"),
    "prompt tuning, 15 tokens": PROMPT,
    "IA3": IA3,
}


def backbone(in_nf4: bool = False, device: str = "cpu", **options: Any) -> CromeVLMForConditionalGeneration:
    """Join the quick start's frozen backbones on a device.

    Args:
        in_nf4: whether to quantize the language model to nf4.
        options: further arguments of `model.composite`.
    """
    made = composite(in_nf4=in_nf4, device_map=None if device == "cpu" else device, **options)
    if device == "cpu":
        made.language_model.set_attn_implementation("eager")  # faster on a CPU, as in the quick start
    return made


def attach(composite: nn.Module, method: str) -> Any:
    """Attach a method to a separate host. In the frozen model alone the gradient goes to the embeddings."""
    config = CONFIGS[method]
    if config is not None:
        return get_peft_model(composite, config)
    composite.requires_grad_(False)
    for paths in find_branches(composite, BOTH).values():
        for path in paths:
            site = composite.get_submodule(path)
            site.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_(True))
    return composite


def batch_of(host: Any, rows: int, tokens: int, prompt: bool = False, labeled: float = 1.0) -> dict[str, torch.Tensor]:
    """Build rows of one image and random words, the same in each call, on the host's device.

    Args:
        host: a composite, or a LLaVA.
        tokens: number of tokens in each row, including the image's.
        prompt: whether soft tokens come first.
        labeled: share of a row's tokens that have labels, at its end.
    """
    config = host.config
    per_image = getattr(host, "image_seq_length", None) or config.image_seq_length
    size = getattr(config, "image_height_width", None) or (config.vision_config.image_size,) * 2
    last = min(LAST_WORD, config.get_text_config().vocab_size)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_WORD, last, (rows, tokens), generator=chance)
    ids[ids == config.image_token_id] = FIRST_WORD
    ids[:, 4 : 4 + per_image] = config.image_token_id
    if prompt:
        ids = torch.cat([torch.tensor(SOFT_TOKENS).expand(rows, -1), ids], dim=1)
    labels = ids.clone()
    labels[:, : ids.shape[1] - round(labeled * ids.shape[1])] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(rows, 3, *size, generator=chance).to(host.dtype)
    return {key: value.to(host.device) for key, value in batch.items()}


def training_step(
    model: nn.Module, batch: dict[str, torch.Tensor], ask: Callable[[nn.Module, Any], Any] = lambda model, batch: batch
) -> Callable[[], None]:
    """Return a function that runs one step: forward, backward, and AdamW on the trained weights.

    Args:
        ask: function that makes the model's arguments from a batch, called at each step.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step() -> None:
        model(**ask(model, batch), use_cache=False).loss.backward()  # as in Trainer
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def base_of(model: nn.Module) -> Any:
    """Return the host, whatever is attached to it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
