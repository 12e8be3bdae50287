"""Define what a case of the zoo is, and what the builders of cases share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import modeling_rope_utils

VOCABULARY, IMAGE_TOKEN, WIDTH, VISION_WIDTH, IMAGE_SIZE, PATCH = 64, 60, 32, 16, 8, 4
AUDIO_TOKEN = 61

Batch = dict[str, Any]

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}


@dataclass
class Case:
    """A model in eval mode, a batch of two rows with one image (or sound) each, and a row without.

    Attributes:
        sites: for each branch, the full paths of the modules that CROME is expected to wrap.
        text_only: the arguments of `forward` without an image; None where the architecture needs an image.
        scaled_table: whether the embedding table multiplies its rows, so that a merge is exact to one rounding only.
        exclude_from_generate: the batch's entries that `generate` does not take.
        not_applicable: for each check that does not apply to this architecture, the reason.
        known: makes the configuration of the best-known checkpoint, where the class's defaults do not.
    """

    model: nn.Module
    batch: Batch
    sites: dict[str, list[str]]
    text_only: Batch | None
    scaled_table: bool = False
    exclude_from_generate: tuple[str, ...] = field(default=("labels",))
    not_applicable: dict[str, str] = field(default_factory=dict)
    known: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        # Where no `forward` takes the types of tokens (transformers 4), `generate` refuses them.
        if not any("mm_token_type_ids" in inspect.signature(m.forward).parameters for m in self.model.modules()):
            self.batch.pop("mm_token_type_ids", None)

    def to(self, device: str) -> Case:
        """Return the same case with its model and its batches on a device."""
        text_only = moved(self.text_only, device) if self.text_only else None
        return replace(self, model=self.model.to(device), batch=moved(self.batch, device), text_only=text_only)

    def generate_inputs(self) -> Batch:
        return {key: value for key, value in self.batch.items() if key not in self.exclude_from_generate}


def moved(batch: Batch, device: str) -> Batch:
    """Return the batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


# name -> builder. The name is the architecture's model_type, with a suffix where one has several builders.
ZOO: dict[str, Callable[[], Case]] = {}
# model_type -> (why CROME cannot be attached, builder of a tiny model that shows the error)
REFUSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {}


def architecture(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Add a builder to the zoo, so that every test in `tests/zoo/` runs on it."""

    def enter(builder: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in ZOO, name
        ZOO[name] = builder
        return builder

    return enter


def refused(name: str, because: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Add an architecture that CROME refuses, with the reason."""

    def enter(builder: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in REFUSED, name
        REFUSED[name] = (because, builder)
        return builder

    return enter


def token_rows(
    images: int, tokens_per_image: int, *, around: tuple[int, int] | None = None, token: int = IMAGE_TOKEN
) -> Batch:
    """Build two rows [1, (start) image tokens (end), two words], with labels on the words. `around` gives the ids of
    start and end."""
    start, end = ([around[0]], [around[1]]) if around else ([], [])
    image = start + [token] * tokens_per_image + end
    ids = torch.tensor([[1] + image * images + [5, 6], [1] + image * images + [7, 8]])
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def words() -> Batch:
    ids = torch.tensor([[1, 9, 10, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a language model's rotary positions under the installed release's name for them. The name differs between
    transformers 4 and 5."""
    return {"rope_parameters" if hasattr(modeling_rope_utils, "RopeParameters") else "rope_scaling": parameters}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def finish(model_class: type, config: Any) -> nn.Module:
    """Build a model with a fixed seed, with weights large enough that every part changes the logits."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 / max(parameter[0].numel(), 1) ** 0.25, generator=generator)
    return model
