"""Save a composite: the trained weights, and the names of the other parts."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..sharing.written import check_files
from ..utils.atomic import moved_into
from .configuration_crome_vlm import CromeVLMConfig
from .fingerprint import changed

logger = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]


def part_names(config: CromeVLMConfig) -> dict[str, str | None]:
    """Map the parts whose weights a name can give to that name; a composite without a Q-Former has two."""
    names = {"vision_tower": config.vision_model_name_or_path, "language_model": config.text_model_name_or_path}
    return names if config.qformer_config is None else {**names, "qformer": config.qformer_model_name_or_path}


def select_weights(model: Any, state_dict: Weights) -> Weights:
    """Select what a checkpoint stores: everything outside the backbones, and backbone weights that no name gives.

    Args:
        model: the composite.
        state_dict: state dict of the whole composite.
    Returns:
        The projection; each backbone weight that trains, has trained under `train()`, has changed since the
        composite was built, or was loaded from a composite's checkpoint; all weights of a backbone without a
        name.
    Raises:
        ValueError: a backbone without a name is quantized, a quantized backbone changed, or adapters are attached.
    """
    of_peft = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, of_peft)]
    if wrapped:
        raise ValueError(
            f"The model holds PEFT layers ({wrapped[:3]}). Save the adapter with peft_model.save_pretrained(...), and "
            "the composite before get_peft_model or after peft_model.unload()."
        )
    names = part_names(model.config)
    unnamed = [part for part, name in names.items() if name is None]
    for part in unnamed:
        if getattr(getattr(model, part), "hf_quantizer", None) is not None:
            raise ValueError(
                f"{part} is quantized and has no name, so its weights would have to be stored quantized. Load it by "
                "name: from_backbones(vision='...', language='...', quantization_config=...)."
            )
    different = changed(state_dict, model._samples)
    quantized = [key for key in different if (part := key.split(".", 1)[0]) in names and _is_packed(model, part, key)]
    if quantized:
        raise ValueError(
            f"Quantized weights have changed since they were loaded ({sorted(quantized)[:3]}), which no name gives "
            "and a composite's checkpoint does not hold. Load the backbone without quantization_config to change it."
        )
    stored = model._stored_keys | model.trained_backbone_keys() | different | _head_key(model)
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if (part := key.split(".", 1)[0]) not in names or part in unnamed or key in stored
    }


def _head_key(model: Any) -> set[str]:
    """Return the key of a head that is no longer tied if the configuration does not record that (T5)."""
    text_config, language_model = model.config.text_config, model.language_model
    reloaded = type(text_config).from_dict(text_config.to_dict())
    before, after = (getattr(config, "tie_word_embeddings", False) for config in (text_config, reloaded))
    head = language_model.get_output_embeddings() if after and not before else None
    return {f"language_model.{name}.weight" for name, module in language_model.named_modules() if module is head}


def _is_packed(model: Any, part: str, key: str) -> bool:
    if getattr(getattr(model, part), "hf_quantizer", None) is None:
        return False
    weight = dict(model.named_parameters()).get(key)
    # Packed values have another class if they are stored as floats, as for FSDP.
    return weight is not None and (type(weight) is not torch.nn.Parameter or not weight.is_floating_point())


def save(model: Any, write: Callable[..., Any], save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Write a checkpoint to a temporary place and move it file by file, so that no file is ever half-written.

    Args:
        model: the composite.
        write: `PreTrainedModel.save_pretrained` of the composite.
        save_directory: created if it is missing.
        kwargs: arguments of `PreTrainedModel.save_pretrained`.
    Raises:
        ValueError: see `select_weights`, or the written weights differ from the selected ones; no file is left then.
    """
    directory = Path(save_directory)
    if directory.is_file():
        raise ValueError(f"{directory} is a file; expected a directory to save to. Write another save_directory.")
    directory.mkdir(parents=True, exist_ok=True)
    if not getattr(model, "_hf_peft_config_loaded", False):  # with adapters, transformers stores only the adapters
        state_dict = kwargs.pop("state_dict", None)
        kwargs["state_dict"] = select_weights(model, state_dict if state_dict is not None else model.state_dict())
        kwargs["save_original_format"] = False  # `load` reads the composite's keys
        model.config.vision_config.dtype = model.vision_tower.dtype
        model.config.text_config.dtype = model.language_model.dtype
        if model.qformer is not None:
            model.config.qformer_config.dtype = model.qformer.model.dtype
        _tell_what_is_stored_whole(model)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", directory.name)
    with moved_into(directory) as temporary:
        # Compute this before the call, which empties its argument.
        meant = [*remove_tied_weights_from_state_dict(dict(kwargs.get("state_dict", {})), model)]
        write(temporary, **kwargs)
        if meant:
            check_files(temporary, meant)
        new = {path.name for path in temporary.iterdir()}
    if SAFE_WEIGHTS_NAME in new or SAFE_WEIGHTS_INDEX_NAME in new:
        for old in directory.glob("model*.safetensors*"):
            if old.name not in new:  # weights of an earlier save would be read instead
                old.unlink()


def _tell_what_is_stored_whole(model: Any) -> None:
    for part, prefix in (("vision_tower", "vision"), ("language_model", "text")):
        source = getattr(model.config, f"{prefix}_config").name_or_path
        if getattr(model.config, f"{prefix}_model_name_or_path") is None and source:
            size = sum(parameter.nbytes for parameter in getattr(model, part).parameters()) / 1e6
            logger.warning(
                f"{part} was handed over as an object, so it is stored whole, {size:.0f} MB. If its weights are still "
                f"those of {source!r}: model.config.{prefix}_model_name_or_path = {source!r}, and save again."
            )
