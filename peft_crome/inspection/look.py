"""Collect everything to show of an adapter: its files, and its effect on a prompt with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image
from transformers.utils import cached_file

from ..backbone.model import unwrapped
from ..tuner.guard import from_images
from ..tuner.layer import crome_layers
from ..utils.read_image import read_image
from ..vlm import CromeVLMConfig, CromeVLMProcessor
from ..vlm.backbones import language_class
from .activity import BranchActivity, inspect_activity
from .places import ImageMap, map_images, words
from .weights import AdapterReport, inspect_adapter


@dataclass(frozen=True, eq=False)
class BranchView:
    """One branch's activity, with the places of its tokens.

    Attributes:
        activity: the numbers.
        maps: images with the tokens laid over them. Empty if the tokens are not cells of an image.
        words: the tokens as text, each with its number among the activity's tokens, or None in a gap.
    """

    activity: BranchActivity
    maps: list[ImageMap]
    words: list[tuple[str, int | None]]


@dataclass(frozen=True, eq=False)
class View:
    """Result of `look` for one adapter, with its backbone or without.

    Attributes:
        name: a name that differs from that of the adapter beside it.
        report: report on its files.
        branches: its effect on the input. None without a prompt.
        prompt: the question.
        images: number of images.
    """

    name: str
    report: AdapterReport
    branches: list[BranchView] | None = None
    prompt: str | None = None
    images: int = 0


def look(
    adapter: str | Path,
    *,
    prompt: str | None = None,
    images: Sequence[Image.Image | str] = (),
    model: str | None = None,
    system: str | None = None,
    device: str | None = None,
) -> View:
    """Read an adapter's files, and with a prompt load its backbone and run it once.

    Args:
        adapter: a directory or a Hub repository.
        prompt: the user's message. Without it, only files are read and no backbone is loaded.
        images: PIL images or paths, which come before the prompt in their order.
        model: directory or name of the backbone. None stands for the adapter's directory if it contains one, as a
            stage's does, and otherwise for the base model that the adapter names.
        system: a system message.
        device: device to run on. None leaves the model where it is loaded.
    Raises:
        ValueError: the adapter cannot be read (see `inspect_adapter`), its backbone cannot be found, or no branch
            reads the images.
    """
    report = inspect_adapter(adapter)
    if prompt is None:
        return View(str(adapter), report)
    network, processor = load_with_backbone(report, model, device)
    layers = list(crome_layers(network))
    sees = ({branch for _, layer in layers for branch in layer.branches} - {"text"}) | from_images(layers)
    if images and not sees:
        raise ValueError(
            f"{adapter} has no branch that reads images, only {[b.branch for b in report.branches]}. Leave the "
            "image out, or give an adapter of a model that sees."
        )
    # The model's processor decides: a composite's images are read by our rules, a host's by transformers'.
    read = read_image if isinstance(processor, CromeVLMProcessor) else load_image
    opened = [read(image) for image in images]
    batch = encode(processor, network, prompt, opened, system)
    tokenizer = getattr(processor, "tokenizer", processor)
    base = unwrapped(network)
    branches = [
        BranchView(activity, map_images(base, batch, activity, opened, processor), words(activity, tokenizer))
        for activity in inspect_activity(network, batch)
    ]
    return View(str(adapter), report, branches, prompt, len(images))


def load_with_backbone(report: AdapterReport, model: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """Load the backbone with the adapter, in evaluation mode, and its processor (a tokenizer if it has no vision).

    Raises:
        ValueError: the backbone is unknown or cannot be loaded.
    """
    config_file = cached_file(report.source, "config.json", _raise_exceptions_for_missing_entries=False)
    name = model or (report.source if config_file else report.base_model)
    if name is None:
        raise ValueError(f"{report.source} names no base model. Write --model and the backbone's directory or name.")
    try:
        config = AutoConfig.from_pretrained(name)
        ours = {"adapter": "ignore"} if isinstance(config, CromeVLMConfig) else {}
        sees = type(config) in AutoModelForImageTextToText._model_mapping
        auto_class: Any = AutoModelForImageTextToText if sees else language_class(config)
        network = auto_class.from_pretrained(name, device_map=device, **ours)
        processor = _processor(name, network)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The backbone {name} of {report.source} cannot be loaded ({error}). Write --model and its directory or "
            "name."
        ) from error
    if not any(crome_layers(network)):  # transformers loads an adapter beside a model by itself
        network = PeftModel.from_pretrained(network, report.source)
    return network.eval(), processor


def encode(
    processor: Any, model: Any, prompt: str, images: Sequence[Image.Image] = (), system: str | None = None
) -> dict[str, Any]:
    """Turn a prompt into the model's inputs, by the chat template if there is one.

    Args:
        processor: a processor, or a tokenizer if there are no images.
        model: gives the device and the start token of a decoder.
        prompt: the user's message.
        images: images before the prompt.
        system: a system message.
    Raises:
        ValueError: there are images, and the processor is only a tokenizer.
    """
    sees = getattr(processor, "image_processor", None) is not None
    if images and not sees:
        raise ValueError(f"{type(processor).__name__} reads no images. Leave --image out, or name a model that sees.")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content if sees else prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}] if sees else system})
        batch = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        marks = "".join(f"{processor.image_token}\n" for _ in images)
        text = marks + (f"{system}\n" if system is not None else "") + prompt
        batch = processor(text=text, return_tensors="pt", **({"images": list(images)} if images else {}))
    inputs = dict(batch.to(model.device))
    text_config = model.config.get_text_config()
    if model.config.is_encoder_decoder or text_config.is_encoder_decoder:
        start = model.generation_config.decoder_start_token_id
        start = text_config.decoder_start_token_id if start is None else start
        inputs["decoder_input_ids"] = torch.tensor([[start]], device=model.device)
    return inputs


def _processor(name: str, model: Any) -> Any:
    if not isinstance(model.config, CromeVLMConfig):
        return AutoProcessor.from_pretrained(name)
    try:
        return CromeVLMProcessor.from_pretrained(name)
    except (OSError, ValueError):  # saved without a processor: use the backbones'
        return CromeVLMProcessor.from_backbones(config=model.config)
