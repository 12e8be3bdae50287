"""Load a vision-language model with an adapter, as a recipe's `model` or an adapter's directory names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.utils import CONFIG_NAME, cached_file

from ...tuner import CromeConfig
from ...vlm.backbones import language_class
from ..directory.stage import RECORD, read_record
from ..errors import StageError
from ..quantization import bits_of, load_config
from ..recipe.schema import Adapter, Host, Recipe
from ..stages import ADAPTER
from .previous import check_installed, check_same_adapter, go_on_with, located


def is_adapter(directory: str) -> bool:
    """Whether a folder or a Hub repository has an adapter and no model."""
    return _has(directory, ADAPTER_CONFIG_NAME) and not _has(directory, CONFIG_NAME)


def has_been_trained(directory: str) -> bool:
    """Whether a folder or a Hub repository has an adapter or a stage, from which a run continues."""
    return is_adapter(directory) or _has(directory, RECORD)


def place_of_processor(host: Host, directory: str | None = None) -> tuple[str, str | None] | None:
    """Return the folder or Hub repository that has the model's processor, and its revision; None if there is none.

    Args:
        directory: directory of an adapter, which may have the processor that it was trained with.
    """
    places = [(host.name, host.revision)] if directory is None else [(directory, None), (host.name, host.revision)]
    for name, revision in places:
        if any(_has(name, f"{kind}_config.json", revision) for kind in ("processor", "preprocessor")):
            return name, revision
    return None


def _has(directory: str, file: str, revision: str | None = None) -> bool:
    try:
        found = cached_file(directory, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return found is not None
    except (OSError, HFValidationError):  # neither a folder nor a reachable repository
        return False


def host_of(recipe: Recipe) -> Host | None:
    """Return the model that a recipe adapts; None: it trains a composite."""
    if recipe.model is not None:
        return recipe.model
    if recipe.previous is None or not is_adapter(recipe.previous):
        return None
    return host_of_adapter(recipe.previous)


def host_of_adapter(directory: str) -> Host:
    """Return the model that an adapter was trained on, with the same settings for loading.

    Raises:
        StageError: the adapter names no model.
    """
    config = PeftConfig.from_pretrained(directory)
    name = config.base_model_name_or_path
    if name is None:
        raise StageError(f"{directory} names no model. Write base_model_name_or_path into its adapter_config.json.")
    record = _record(directory)
    host_values = record["stages"][-1]["recipe"].get("model") if record else None
    if host_values is not None:
        return Host(**{**host_values, "name": name})
    trained_on: dict[str, Any] = getattr(config, "trained_on", None) or {}
    return Host(name=name, revision=config.revision, quantization=bits_of(trained_on.get("quantization")))


def read_processor(host: Host, directory: str | None = None) -> Any:
    """Load the model's processor with the settings of a recipe.

    Args:
        directory: directory of an adapter, which may have the processor that it was trained with.
    Raises:
        StageError: there is no processor, or it does not know a setting.
    """
    place, revision = place_of_processor(host, directory) or (host.name, host.revision)
    try:
        processor = AutoProcessor.from_pretrained(place, **_revision(revision), **host.processor)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise StageError(f"model: the processor of {place!r} cannot be loaded: {error}") from error
    if not host.processor:
        return processor
    kept = _settings_of(processor)
    ignored = [key for key, value in host.processor.items() if not _holds(kept.get(key), value)]
    if ignored:
        known = sorted(key for key in kept if key.startswith(("do_", "min_", "max_", "size", "crop", "patch")))
        raise StageError(
            f"model.processor: {type(processor).__name__} does not take {ignored}. Write settings that it has, of "
            f"{known}."
        )
    return processor


def _settings_of(processor: Any) -> dict[str, Any]:
    """Return the settings of a processor and its parts. An image processor may keep a pixel limit in its size."""
    kept: dict[str, Any] = {}
    for part in (getattr(processor, "video_processor", None), getattr(processor, "image_processor", None), processor):
        if part is not None:
            kept |= part.to_dict()
            size = getattr(part, "size", None) or {}
            names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
            kept |= {names[key]: size[key] for key in names if key in size and part is not processor}
    return kept


def _holds(kept: Any, value: Any) -> bool:
    if isinstance(value, dict) and isinstance(kept, dict):
        return all(kept.get(key) == inner for key, inner in value.items())
    return bool(kept == value)


def read_model(host: Host, config: Any, device: Any = None) -> Any:
    """Load the frozen model.

    Args:
        config: the result of `read_config`.
    Raises:
        StageError: the model cannot be loaded, or bitsandbytes is missing.
    """
    check_installed("model.quantization", host.quantization)
    dtype: Any = getattr(torch, host.dtype) if host.dtype is not None else "auto"
    computed = dtype if host.dtype is not None else getattr(config, "dtype", None) or torch.float32
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": device, **_revision(host.revision)}
    if host.quantization is not None:
        arguments["quantization_config"] = load_config(host.quantization, computed)
    if host.attn_implementation is not None:
        arguments["attn_implementation"] = host.attn_implementation
    try:
        model = auto_class(config).from_pretrained(located(host.name), **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise StageError(f"model: {host.name!r} cannot be loaded: {error}") from error
    return model.requires_grad_(False)


def read_config(host: Host) -> Any:
    """Load the model's configuration.

    Raises:
        StageError: the model cannot be found.
    """
    try:
        return AutoConfig.from_pretrained(host.name, **_revision(host.revision))
    except (OSError, ValueError) as error:
        raise StageError(
            f"model: {host.name!r} is not a folder with a model, and the Hub does not give it ({error}). Check the "
            "name. If the model of an adapter has moved, write its new place into adapter_config.json."
        ) from error


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a model, preferably one with vision.

    Raises:
        ValueError: the model is neither of these nor a language model.
    """
    for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in kind._model_mapping:
            return kind
    return language_class(config)


def build_on_host(recipe: Recipe, host: Host) -> tuple[PeftModel, Any, dict[str, Any] | None]:
    """Build the model with a new adapter, or with the one that a recipe starts from.

    Returns:
        The PEFT model, its processor, and the record of the previous run (None: there is none).
    Raises:
        StageError, ValueError: a part cannot be loaded, or the adapter does not fit.
    """
    host_config = read_config(host)
    processor = read_processor(host, recipe.previous)
    model = read_model(host, host_config)
    if recipe.previous is None:
        also = [part for part in recipe.trains if part != ADAPTER]
        config = CromeConfig(**(recipe.adapter or Adapter()).model_dump(), modules_to_save=also or None)
        return get_peft_model(model, config), processor, None
    config = CromeConfig.from_pretrained(recipe.previous)
    check_same_adapter(recipe, config)
    go_on_with(config, recipe)
    adapted = PeftModel.from_pretrained(model, recipe.previous, config=config, is_trainable=True)
    return adapted, processor, _record(recipe.previous)


def read_reader(directory: str) -> tuple[Any, Any]:
    """Load the configuration and the processor behind a directory or a Hub name, without weights.

    Args:
        directory: directory of an adapter, a model, or a stage.
    Raises:
        StageError: as in `load_adapted`.
    """
    host = host_of_adapter(directory) if is_adapter(directory) else Host(name=directory)
    return read_config(host), read_processor(host, directory)


def load_adapted(directory: str, device: Any = None) -> tuple[Any, Any]:
    """Load the model behind a directory or a Hub name, in evaluation mode, and its processor.

    Args:
        directory: directory of a model, or of an adapter, whose model is loaded as in training.
    Raises:
        StageError, OSError, ValueError: a part is missing or does not fit.
    """
    has_adapter = is_adapter(directory)
    host = host_of_adapter(directory) if has_adapter else Host(name=directory)
    config = read_config(host)
    processor = read_processor(host, directory)
    model = read_model(host, config, device)
    return (PeftModel.from_pretrained(model, directory) if has_adapter else model).eval(), processor


def _record(directory: str) -> dict[str, Any] | None:
    return read_record(directory) if (Path(directory) / RECORD).is_file() else None


def _revision(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}
