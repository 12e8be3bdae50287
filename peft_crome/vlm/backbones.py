"""Load the backbones of a composite: a vision tower and a language model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..backbone.model import part_for_good, tied_weights
from .blip_parts import PARTS_CLASSES, load_parts
from .configuration_crome_vlm import HUB_ARGUMENTS, revision_argument
from .image_size import fixed_image_size
from .vision import find_vision_model, vision_class

Quantization: TypeAlias = QuantizationConfigMixin | dict[str, Any]
PARTS = ("vision_tower", "language_model")


@dataclass(frozen=True)
class Loading:
    """How to load backbones; the same for both unless a mapping has an entry for each.

    Args:
        dtype: as in transformers; None: the checkpoint's.
        device_map: as in transformers; a dictionary names the composite's modules (`language_model.model.layers.0`).
        attn_implementation: a name, or {"vision_config": name, "text_config": name}.
        arguments: other arguments of `from_pretrained` (`cache_dir`, `token`, `local_files_only`, ...).
    """

    dtype: torch.dtype | str | None = None
    device_map: Any = None
    attn_implementation: str | Mapping[str, str] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def for_hub(self, revision: str | None) -> dict[str, Any]:
        """Select the arguments that processors and configurations understand as well, and add a revision."""
        known = {name: value for name, value in self.arguments.items() if name in HUB_ARGUMENTS}
        return known | revision_argument(revision)

    def for_part(
        self, part: str, revision: str | None = None, quantization_config: Quantization | None = None
    ) -> dict[str, Any]:
        """Build the arguments of `from_pretrained` for "vision_tower" or "language_model".

        Raises:
            ValueError: a device_map dictionary has no entry for the part.
        """
        key = "vision_config" if part == "vision_tower" else "text_config"
        attention = self.attn_implementation
        attention = attention.get(key) if isinstance(attention, Mapping) else attention
        device_map = self.device_map
        if isinstance(device_map, Mapping):
            inside = {k: d for k, d in device_map.items() if k == part or k.startswith(f"{part}.")}
            device_map = {k.removeprefix(part).removeprefix("."): device for k, device in inside.items()}
            if not device_map and "" not in self.device_map:
                raise ValueError(
                    f"device_map has keys {list(self.device_map)}, none for {part!r}; add {part!r}: 'cpu'."
                )
            device_map = device_map or {"": self.device_map[""]}
        chosen = {
            "attn_implementation": attention,
            "device_map": device_map,
            "revision": revision,
            "quantization_config": quantization_config,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return {"dtype": self.dtype if self.dtype is not None else "auto", **self.arguments, **chosen}


def load_vision_tower(
    name: str,
    revision: str | None,
    config: PreTrainedConfig | None,
    quantization_config: Quantization | None,
    loading: Loading,
) -> PreTrainedModel:
    """Load the tower by name, or the vision half of a dual model.

    Raises:
        ValueError: the named model has no vision tower, or its sizes differ from the configuration's.
    """
    arguments = loading.for_part("vision_tower", revision, quantization_config)
    stored = AutoConfig.from_pretrained(name, **loading.for_hub(revision))
    of_blip = stored.model_type in PARTS_CLASSES
    if config is not None and type(stored) is type(config):
        _check_sizes(name, stored, config)
        arguments["config"] = _clean(config, quantization_config)
    elif config is not None and (of_blip or type(getattr(stored, "vision_config", None)) is type(config)):
        _check_sizes(name, stored.vision_config, config)
        stored.vision_config = _clean(config, quantization_config)
        arguments["config"] = stored
    load = load_parts if of_blip else vision_class(stored).from_pretrained  # the former skips a language model
    return _with_quantizer(load(name, **arguments))


def _check_sizes(name: str, stored: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Refuse a tower whose weights a composite cannot have been trained with."""
    different = [
        f"{key}={getattr(stored, key)}, and this composite was made with {key}={getattr(config, key)}"
        for key in ("image_size", "patch_size", "hidden_size")
        if hasattr(stored, key) and getattr(stored, key) != getattr(config, key, None)
    ]
    if different:
        raise ValueError(
            f"The tower {name!r} has {'; '.join(different)}. Name the tower that it was made with, or join and train "
            "anew: CromeVLMForConditionalGeneration.from_backbones(vision=..., language=...)."
        )


def _with_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Return the tower of a loaded model, which was quantized with the whole model."""
    tower = find_vision_model(model)
    if hasattr(model, "hf_quantizer"):
        tower.hf_quantizer = model.hf_quantizer
    return tower


def load_language_model(
    name: str,
    revision: str | None,
    config: PreTrainedConfig | None,
    quantization_config: Quantization | None,
    loading: Loading,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Load the language model with its head by name, decoder-only or encoder-decoder.

    Args:
        config: configuration in a saved composite, whose tables may be resized or no longer tied.
        stored: weights of the language model in the composite's files.
    Raises:
        ValueError: the named model is neither, or weights of the saved composite are missing everywhere.
    """
    arguments = loading.for_part("language_model", revision, quantization_config)
    stored_config = AutoConfig.from_pretrained(name, **loading.for_hub(revision))
    auto_class = language_class(config or stored_config)
    if config is None:
        return auto_class.from_pretrained(name, **arguments)
    config = _clean(config, quantization_config)
    ours, theirs = config.get_text_config(), stored_config.get_text_config()
    vocab_size = getattr(ours, "vocab_size", None)
    resized = vocab_size != getattr(theirs, "vocab_size", None)
    if resized:
        ours.vocab_size = theirs.vocab_size
    ties = [getattr(settings, "tie_word_embeddings", None) for settings in (config, ours)]
    for settings, published in ((config, stored_config), (ours, theirs)):
        if getattr(published, "tie_word_embeddings", False):  # a merge unties them, and the files store one table
            settings.tie_word_embeddings = True
    model, info = auto_class.from_pretrained(name, config=config, output_loading_info=True, **arguments)
    stored = stored or {}
    missing = sorted(set(info["missing_keys"]) - stored.keys())
    if missing:
        raise ValueError(
            f"{name!r} has no {missing[:3]} ({len(missing)} in all), and the composite's own files have none either. "
            "Name the language model that the composite was saved with."
        )
    if resized:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    tied = tied_weights(model)
    kept = [stored[name] for name in tied & stored.keys()]
    differ = any(not torch.equal(kept[0], other) for other in kept[1:])
    for settings, tie in zip((model.config, model.config.get_text_config()), ties, strict=True):
        if tie is not None:
            settings.tie_word_embeddings = tie and not differ
    part_for_good(model, tied)
    return model


def language_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """Return the auto class that loads a language model with its head.

    Raises:
        ValueError: transformers has no such class for this configuration.
    """
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    has_remote_code = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class._model_mapping and not has_remote_code:
        raise ValueError(
            f"{config.model_type!r} is not a language model that {auto_class.__name__} knows. Pass a causal or "
            "encoder-decoder language model as language=."
        )
    return auto_class


def _clean(config: PreTrainedConfig, quantization_config: Quantization | None) -> PreTrainedConfig:
    """Remove the quantization of the last load from the configuration, where it would pass for the checkpoint's."""
    if quantization_config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def processor_image_size(name: str, revision: str | None, loading: Loading) -> tuple[int, int] | None:
    """Return the image size that the tower's image processor gives; None: no processor, or it keeps the shape."""
    try:
        processor = AutoImageProcessor.from_pretrained(name, **loading.for_hub(revision))
    except (OSError, ValueError):
        return None  # such a tower's configuration states the size
    return fixed_image_size(processor)
