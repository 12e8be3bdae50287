"""Variants that the ablation compares: the adapter, the adapter without a part, and PEFT's other methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from peft_crome import CromeConfig

LANGUAGE = r".*language_model.*\."  # the tower's layers have the same names
SOFT_TOKENS = [0, *range(3, 17)]  # unused tokens of SmolLM2: names of files, issues and notebooks
EQUAL = 427  # 3·576·427 = 737,856 weights: one branch alone, or two branches without their gates
OWN_UP = 213  # 6·576·213 = 736,128: two W_u


@dataclass(frozen=True)
class Variant:
    """One row of the ablation.

    Args:
        name: name in the table.
        attach: function of the composite and a sample of the tower's output, (images, tokens, d_v), that makes
            the model to train.
        align_rate, finetune_rate: peak learning rates of AdamW in the two stages.
        main: whether it runs with three seeds.
        soft_prompt: whether the prompt begins with SOFT_TOKENS.
    """

    name: str
    attach: Callable[[nn.Module, torch.Tensor], nn.Module]
    align_rate: float = 1e-3
    finetune_rate: float = 1e-3
    main: bool = True
    soft_prompt: bool = False


class Bottleneck(nn.Module):
    """Compute what one branch adds to an embedding. This is not the package's code, so that parts can be left out.

    Args:
        width: d.
        bottleneck_dim: m.
        rms: root mean square of the embedding table, by which the package scales W_g and W_d.
        gated: True: SiLU(x W_g) * (x W_d). False: SiLU(x W_d).
        up: W_u if another branch shares it.
    """

    def __init__(
        self, width: int, bottleneck_dim: int, rms: float, gated: bool = True, up: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, bottleneck_dim, bias=False) if gated else None
        self.down = nn.Linear(width, bottleneck_dim, bias=False)
        self.up = nn.Linear(bottleneck_dim, width, bias=False) if up is None else up
        for linear in filter(None, (self.gate, self.down)):
            nn.init.normal_(linear.weight, std=1 / (rms * width**0.5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given, x = x, x.float()
        hidden = F.silu(self.down(x)) if self.gate is None else F.silu(self.gate(x)) * self.down(x)
        return (given + self.up(hidden)).to(given.dtype)


def by_hooks(text: Bottleneck, vision: Bottleneck, model: nn.Module) -> nn.Module:
    """Add bottlenecks at the places of the package's adapter."""
    model.requires_grad_(False)
    model.text_bottleneck, model.vision_bottleneck = text, vision
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: text(output))
    model.vision_fusion.register_forward_hook(lambda module, inputs, output: vision(output))
    return model


def table(model: Any) -> torch.Tensor:
    """Return every 48th row of the language model's embedding table, in fp32."""
    return model.get_input_embeddings().weight.detach()[::48].float()


def table_rms(model: Any) -> float:
    """Return the median root mean square of these rows, as the package computes it."""
    return float(table(model).square().mean(-1).sqrt().median())


def without_gate(model: Any, features: torch.Tensor) -> nn.Module:
    """Build the bottleneck without W_g, with equally many weights by a larger m."""
    width, rms = table(model).shape[-1], table_rms(model)
    text = Bottleneck(width, EQUAL, rms, gated=False)
    return by_hooks(text, Bottleneck(width, EQUAL, rms, gated=False, up=text.up), model)


def own_up(model: Any, features: torch.Tensor) -> nn.Module:
    """Build the adapter with a W_u per branch, with equally many weights by a smaller m."""
    width, rms = table(model).shape[-1], table_rms(model)
    return by_hooks(Bottleneck(width, OWN_UP, rms), Bottleneck(width, OWN_UP, rms), model)


def peft(config: PeftConfig) -> Callable[[nn.Module, torch.Tensor], nn.Module]:
    """Attach a PEFT method with its defaults."""
    return lambda model, features: get_peft_model(model, config)


def crome(init: str = "scaled", **kwargs: Any) -> Callable[[nn.Module, torch.Tensor], nn.Module]:
    """Attach the package's adapter with W_g and W_d initialized in some way; W_u is always zero."""

    def attach(model: Any, features: torch.Tensor) -> nn.Module:
        rows = table(model)
        with torch.no_grad():
            projected = model.image_projection(features.float()).flatten(0, 1)
        adapted = get_peft_model(model, CromeConfig(**{"branches": ["text", "vision"], **kwargs}))
        weights = adapted.get_base_model().crome
        if init == "scaled":
            return adapted
        for branch, read in (("text", rows), ("vision", projected)):
            for kind in ("gate", "down"):
                weight = getattr(weights, f"crome_{kind}_{branch}")["default"].weight
                with torch.no_grad():
                    weight.copy_(INITIALIZATIONS[init](read, torch.empty_like(weight)))
        return adapted

    return attach


def normal(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Initialize with standard deviation 0.02, independent of the input."""
    return nn.init.normal_(weight, std=0.02)


def kaiming(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Initialize with PyTorch's default for a linear map."""
    return nn.init.kaiming_uniform_(weight, a=5**0.5)


def per_branch(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scale by the input of this branch, so that hidden features have unit variance in both branches."""
    rms = float(read.square().mean(-1).sqrt().median())
    return nn.init.normal_(weight, std=1 / (rms * weight.shape[1] ** 0.5))


def principal(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Use principal directions of this branch's input, each scaled to unit variance, in random order and sign."""
    centered = read - read.mean(0)
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    deviations = values / len(centered) ** 0.5
    count = min(len(weight), int((deviations > deviations[0] * 1e-3).sum()))
    chosen = torch.arange(len(weight)) % count
    sign = torch.randint(0, 2, (len(weight), 1)) * 2.0 - 1
    return (sign * directions[chosen] / deviations[chosen, None])[torch.randperm(len(weight))]


INITIALIZATIONS = {"normal": normal, "kaiming": kaiming, "per branch": per_branch, "principal": principal}


def only(branch: str) -> Callable[[nn.Module, torch.Tensor], nn.Module]:
    """Attach one branch alone, with equally many weights by a larger m."""
    return crome(branches=[branch], bottleneck_dim=EQUAL)


def lora(target: str, rank: int) -> Callable[[nn.Module, torch.Tensor], nn.Module]:
    """Attach LoRA to some of the language model's linear layers."""
    return peft(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"{LANGUAGE}({target})"))


ALL_LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
IA3 = IA3Config(target_modules=f"{LANGUAGE}(k_proj|v_proj|down_proj)", feedforward_modules=f"{LANGUAGE}down_proj")
PROMPT = TrainableTokensConfig(token_indices=SOFT_TOKENS, target_modules=["embed_tokens"])

VARIANTS = [
    Variant("CROME", crome()),
    Variant("projection alone", lambda model, features: model.requires_grad_(False)),
    Variant("CROME without the gate", without_gate),
    Variant("CROME, W_u per branch", own_up),
    Variant("CROME, vision branch alone", only("vision")),
    Variant("CROME, text branch alone", only("text")),
    Variant("LoRA on q, v", lora("q_proj|v_proj", 13), finetune_rate=2e-3),
    Variant("LoRA on all linear layers", lora(ALL_LINEAR, 2), finetune_rate=2e-3),
    Variant("prompt tuning", peft(PROMPT), align_rate=5e-3, finetune_rate=5e-3, soft_prompt=True),
    Variant("IA3", peft(IA3), align_rate=5e-3, finetune_rate=5e-3),
    *[Variant(f"CROME, m = {m}", crome(bottleneck_dim=m), main=False) for m in (16, 64, 1024)],
    *[Variant(f"CROME, rate {r:g}", crome(), align_rate=r, finetune_rate=r, main=False) for r in (3e-4, 3e-3)],
    *[Variant(f"CROME, W_g and W_d {name}", crome(name), main=False) for name in INITIALIZATIONS],
]
