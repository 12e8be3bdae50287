"""Compare a checkpoint's files with the model that they should contain."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

REMEDY = "Load the model without quantization, put the adapter on it, and write it from there."


def check_ordinary(model: PreTrainedModel) -> None:
    """Refuse a model whose weights do not fit into a regular checkpoint of its class, before a file appears.

    Raises:
        ValueError: it is quantized in a way that transformers cannot write, or has other kinds of layers than its
            class creates, as after torchao's and HQQ's functions.
    """
    name, quantizer = type(model).__name__, getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        if not quantizer.is_serializable():
            method = quantizer.quantization_config.quant_method
            raise ValueError(f"{name} is quantized by {method}, which transformers cannot write. {REMEDY}")
        return
    ordinary = _ordinary(model).state_dict()
    state = model.state_dict()
    strange = sorted(ordinary.keys() ^ state.keys())
    strange += [key for key, value in state.items() if type(value) is not torch.Tensor and key not in strange]
    strange += [key for key, value in state.items() if key not in strange and value.shape != ordinary[key].shape]
    if strange:
        raise ValueError(
            f"{name} has no {strange[:3]} of this kind ({len(strange)} in all), so its checkpoint cannot hold them. "
            f"{REMEDY}"
        )


def check_model_files(folder: Path, model: PreTrainedModel, original_names: bool = True) -> None:
    """Compare the files that `model.save_pretrained(folder)` wrote with the model.

    Args:
        original_names: whether keys are as in the published checkpoints (`save_original_format`).
    Raises:
        ValueError: as in `check_files`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    state = quantizer.get_state_dict_and_metadata(model)[0] if quantizer is not None else None
    # A reader of the files builds the model by its configuration, which decides what may be missing.
    ordinary = _ordinary(model)
    every = ordinary.state_dict()
    left_out = every.keys() - remove_tied_weights_from_state_dict(dict(every), ordinary).keys()
    left_out |= set(type(model)._keys_to_ignore_on_save or ())  # Marian computes its positions
    state = {key: value for key, value in (state or model.state_dict()).items() if key not in left_out}
    if original_names:
        state = revert_weight_conversion(model, state)
    check_files(folder, state)


def _ordinary(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # `save_pretrained` leaves a string, which Apertus cannot read
    with torch.device("meta"):
        return type(model)(config)


def check_files(folder: Path, meant: Iterable[str], names: str = "*.safetensors") -> None:
    """Compare the keys in a folder's safetensors files with the expected ones.

    transformers may ignore a given state dict, for example if a model has a quantizer.

    Args:
        meant: the expected keys.
        names: pattern of the files' names.
    Raises:
        ValueError: keys are missing or unexpected; names them.
    """
    written: set[str] = set()
    for path in folder.glob(names):
        with safe_open(path, framework="pt") as file:
            written |= set(file.keys())
    expected = set(meant)
    problems = {"missing": sorted(expected - written), "unexpected": sorted(written - expected)}
    text = "; ".join(f"{len(keys)} {kind}: {keys[:5]}" for kind, keys in problems.items() if keys)
    if text:
        raise ValueError(f"The written checkpoint differs from the model ({text}), and is not kept. {REMEDY}")
