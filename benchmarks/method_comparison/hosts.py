"""Build the model that all methods of a seed start from: frozen backbones and a projection that knows captions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig

from examples.easy_vqa.data import CAPTION_REQUEST
from examples.easy_vqa.model import POOL_SIZE, PROJECTION, nf4
from examples.easy_vqa.parts import dinov2_small, gemma3_270m, smollm2
from examples.easy_vqa.training import Stage, fit
from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor

from .settings import Experiment
from .tasks import Task
from .tasks.task import features

DTYPE = torch.bfloat16  # of what is frozen, in all records, so that rows compare
LANGUAGES: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3_270m}
FROZEN: dict[str, Callable[[], BitsAndBytesConfig | None]] = {
    "bfloat16": lambda: None,
    "nf4": nf4,
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
ALIGN_RATE = 5e-4


def build(language: Path, frozen: str, projection: Path | None = None) -> Any:
    """Load a composite in which nothing trains.

    Args:
        language: directory of the language model.
        frozen: how it is frozen, a key of `FROZEN`.
        projection: file of `save_projection`; None: a new projection, by the random state.
    """
    model = CromeVLMForConditionalGeneration.from_backbones(
        vision=str(dinov2_small()),
        language=str(language),
        quantization_config=FROZEN[frozen](),
        dtype=DTYPE,
        vision_pool_size=POOL_SIZE,
    )
    model.language_model.set_attn_implementation("eager")  # fused attention is slow backward on a CPU
    layer = getattr(model, PROJECTION).float()
    if projection is not None:
        layer.load_state_dict(load_file(projection))
    return model.requires_grad_(False)


def processor(model: Any, soft_tokens: Sequence[int] = ()) -> Any:
    """Build a composite's processor, with soft tokens before each prompt."""
    made = CromeVLMProcessor.from_backbones(config=model.config)
    if not soft_tokens:
        return made
    made = copy.copy(made)
    made.chat_template = "".join(made.tokenizer.convert_ids_to_tokens(list(soft_tokens))) + made.chat_template
    return made


def align(model: Any, shared: Any, tasks: Sequence[Task], seed: int, steps: int, per_step: int) -> dict[str, Any]:
    """Teach a new projection the captions of all tasks' training images, as many of each task, in mixed order."""
    rows, parts, first = [], [], 0
    for task in tasks:
        count = -(-steps * per_step // len(tasks))
        own = [(first + i, text) for i, text in task.captions("train", count, seed)]
        rows += [{"image_id": i, "turns": [[CAPTION_REQUEST, text]]} for i, text in own]
        parts.append(features(task, shared.image_processor, DTYPE))
        first += len(parts[-1])
    getattr(model, PROJECTION).requires_grad_(True)
    stage = Stage("align", steps, per_step, questions_per_image=1, learning_rate=ALIGN_RATE, word_weight=1.0)
    fitted = fit(model, stage, seed, shared, torch.cat(parts), None, rows, use_cpu=True)
    model.requires_grad_(False)
    return {"settings": asdict(stage), **fitted}


def save_projection(model: Any, file: Path) -> None:
    """Write the projection's weights, under a temporary name first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in getattr(model, PROJECTION).state_dict().items()}, temporary)
    temporary.replace(file)


def attach(model: Any, experiment: Experiment) -> nn.Module:
    """Attach a method to a composite, with what trains in float32."""
    config = experiment.peft_config()
    if config is not None:
        with warnings.catch_warnings():
            # PEFT's LayerNorm tuning does not know RMSNorm's sizes, which only saving for other tools needs.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(experiment.params.trains))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, LNTuningLayer):  # LayerNorms in float32 would pass their dtype on
            layer.register_forward_hook(lambda module, inputs, output: output.to(inputs[0].dtype))
    return model


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy everything that trains, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights of `trained_weights` into a model with the same method on another host."""
    own = dict(model.named_parameters())
    for name, value in weights.items():
        own[name].copy_(value)
