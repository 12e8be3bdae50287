"""Load a composite: the backbones that its configuration names, then the stored weights, strictly."""

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

from ..backbone.compat import load_copies
from ..sharing.stage_record import STAGE_RECORD
from ..sharing.weight_file import read_adapter_file
from .assembly import Composite, assemble
from .backbones import PARTS, Loading, Quantization, language_class, load_language_model, load_vision_tower
from .blip_parts import load_parts, qformer_of
from .configuration_crome_vlm import CromeVLMConfig, quantization_to_dict
from .qformer import QFormer
from .saving import Weights, part_names
from .vision import vision_class

logger = logging.getLogger(__name__)

FILE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")


def _is_adapter_alone(name_or_path: str | os.PathLike, files: dict[str, Any]) -> bool:
    optional = {"_raise_exceptions_for_missing_entries": False, **files}
    has_config = cached_file(name_or_path, CONFIG_NAME, **optional) is not None
    return not has_config and find_adapter_config_file(name_or_path, **files) is not None


def _base_of(adapter: str | os.PathLike, files: dict[str, Any]) -> str:
    """Return the composite that an adapter belongs to.

    Raises:
        ValueError: the adapter names none.
    """
    path = find_adapter_config_file(adapter, **files)
    name = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{adapter} has an adapter and names no composite to put it on. Load that first, then "
            "PeftModel.from_pretrained(composite, adapter)."
        )
    return str(name)


def load(
    cls: type[Composite],
    name_or_path: str | os.PathLike,
    *model_args: Any,
    config: CromeVLMConfig | None = None,
    quantization_config: Quantization | None = None,
    vision_quantization_config: Quantization | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: Any = None,
    generation_config: GenerationConfig | None = None,
    adapter: Literal["load", "ignore"] = "load",
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Composite | tuple[Composite, dict[str, Any]]:
    """Load a composite: the backbones by the names in its configuration, then its stored weights.

    Args:
        cls: the composite's class.
        name_or_path: directory or repository that `save_pretrained` wrote.
        model_args: refused; the composite takes none.
        config: configuration to use instead of the stored one, for instance with other backbone names.
        quantization_config: quantization of the language model; None: as recorded. To load a recorded quantization in
            full precision, pass a config whose text_quantization_config is None.
        vision_quantization_config: quantization of the tower; None: as recorded.
        dtype: dtype of all parts; None or "auto": each part as it was saved.
        torch_dtype: older name of dtype.
        device_map, attn_implementation: see `backbones.Loading`.
        generation_config: generation configuration to use instead of the stored one.
        adapter: "load" attaches a PEFT adapter stored in the same place, as transformers does for every model;
            "ignore" leaves it, for `PeftModel.from_pretrained(model, name_or_path)`.
        output_loading_info: also return which keys were loaded, as transformers does.
        kwargs: hub arguments for this repository (`revision`, `subfolder`) and for all (`cache_dir`, `token`,
            `local_files_only`, ...); the configuration's fields; other arguments of the backbones' from_pretrained.
    Returns:
        The composite in evaluation mode, backbones frozen.
    Raises:
        ValueError: the files do not hold a composite, or weights are missing, unexpected or of the wrong shape.
        OSError: a file or a backbone cannot be found.
    """
    if model_args or adapter not in ("load", "ignore"):
        raise ValueError(
            f"Got {model_args or adapter!r}; expected no positional arguments, adapter='load' or 'ignore'."
        )
    adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
    for name in ("_from_auto", "_from_pipeline", "from_pipeline", "low_cpu_mem_usage", "state_dict"):
        if kwargs.pop(name, None) is not None and name == "state_dict":
            raise ValueError("state_dict= is not supported; call model.load_state_dict(state_dict) after loading.")
    files = {name: kwargs[name] for name in FILE_ARGUMENTS if name in kwargs}
    if config is None and _is_adapter_alone(name_or_path, files):
        adapter_kwargs.setdefault("_adapter_model_path", name_or_path)
        name_or_path = _base_of(name_or_path, files)
    config, unused = _load_config(name_or_path, config, kwargs)
    arguments = {name: value for name, value in (unused | files).items() if name not in ("revision", "subfolder")}
    stored = read_weights(name_or_path, files)
    check_names(stored, config, name_or_path)

    dtype = dtype if dtype is not None else torch_dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    loading = Loading(None if dtype == "auto" else dtype, device_map, attn_implementation, arguments)
    config.vision_quantization_config = (
        quantization_to_dict(vision_quantization_config) or config.vision_quantization_config
    )
    config.text_quantization_config = quantization_to_dict(quantization_config) or config.text_quantization_config
    parts = {part: _load_part(part, config, stored, loading, name_or_path) for part in PARTS}
    config.vision_config, config.text_config = parts["vision_tower"].config, parts["language_model"].config
    qformer = _load_qformer(config, loading)
    model = assemble(cls, config, parts["vision_tower"], parts["language_model"], loading, qformer)
    for projection in ("image_projection", "text_projection"):
        if loading.dtype is None and f"{projection}.weight" in stored:
            getattr(model, projection).to(stored[f"{projection}.weight"].dtype)
    # The weights that `_load_part` has not read yet.
    named = {**part_names(config), "qformer": ""}
    rest = {key: tensor for key, tensor in stored.items() if named.get(key.split(".", 1)[0], "") is not None}
    copy_weights(model, rest, name_or_path)
    model._stored_keys |= {key for key in rest if key.split(".", 1)[0] in part_names(config)}
    config.name_or_path = model.name_or_path = str(name_or_path)
    model.generation_config = generation_config or _load_generation_config(model, name_or_path, files)
    if adapter == "load":
        _load_adapter(model, name_or_path, files, adapter_kwargs)
    info: dict[str, Any] = {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    return (model, info) if output_loading_info else model


def read_weights(name_or_path: str | os.PathLike, files: dict[str, Any]) -> Weights:
    """Read every stored tensor by name, from one file or from shards.

    Raises:
        OSError: no weight file, or a shard is missing.
        ValueError: a file is truncated or not safetensors, or a shard lacks a tensor that the index lists.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, **files}
    single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **optional)
    if single is not None:
        return _read_file(single)
    index_file = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index_file is None:
        raise OSError(
            f"{name_or_path} has no {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; save the model again."
        )
    weight_map = json.loads(Path(index_file).read_text(encoding="utf-8"))["weight_map"]
    weights: Weights = {}
    for shard in sorted(set(weight_map.values())):
        weights.update(_read_file(cached_file(name_or_path, shard, **files)))
    absent = sorted(set(weight_map) - set(weights))
    if absent:
        raise ValueError(
            f"{name_or_path}: missing weights {absent[:8]}, which the index lists; copy all shards again."
        )
    return weights


def _read_file(path: str) -> Weights:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); copy or save it again.") from error


def check_names(stored: Weights, config: CromeVLMConfig, name_or_path: str | os.PathLike) -> None:
    """Refuse weights that clearly do not belong to this composite, before any backbone is loaded.

    Raises:
        ValueError: a projection is missing, or keys belong to no part of a composite.
    """
    expected = []
    if "patch" in (config.image_token_order or ()):
        expected += ["image_projection.weight", *(["image_projection.bias"] if config.image_projection_bias else [])]
    if config.qformer_config is not None:
        expected += ["text_projection.weight", "text_projection.bias"]
        if config.qformer_model_name_or_path is None:
            with torch.device("meta"):
                qformer = QFormer(config.qformer_config, config.num_query_tokens)
            expected += [f"qformer.{key}" for key in qformer.state_dict()]
    missing = [key for key in expected if key not in stored]
    unexpected = [key for key in stored if key not in expected and key.split(".", 1)[0] not in part_names(config)]
    _report(name_or_path, missing, unexpected, [])


def copy_weights(model: torch.nn.Module, weights: Weights, name_or_path: str | os.PathLike) -> None:
    """Copy stored tensors into a model: all of them or none.

    Raises:
        ValueError: a tensor is unexpected or of the wrong shape. The model is unchanged.
    """
    targets = model.state_dict(keep_vars=True)
    unexpected = [key for key in weights if key not in targets]
    wrong = [
        f"{key}: stored {tuple(tensor.shape)}, expected {tuple(targets[key].shape)}"
        for key, tensor in weights.items()
        if key in targets and targets[key].shape != tensor.shape
    ]
    _report(name_or_path, [], unexpected, wrong)
    for key, tensor in weights.items():
        targets[key].data.copy_(tensor)


def _report(name: str | os.PathLike, missing: Iterable[str], unexpected: Iterable[str], wrong: Iterable[str]) -> None:
    problems = {"missing": list(missing), "unexpected": list(unexpected), "of the wrong shape": list(wrong)}
    text = "; ".join(f"{len(keys)} {kind}: {keys[:8]}" for kind, keys in problems.items() if keys)
    if text:
        raise ValueError(
            f"The weights of {name} do not fit this composite: {text}. Load the directory that save_pretrained wrote, "
            "with its own config.json and the backbones it names."
        )


def _load_config(
    name_or_path: str | os.PathLike, config: CromeVLMConfig | None, kwargs: dict[str, Any]
) -> tuple[CromeVLMConfig, dict[str, Any]]:
    """Load the configuration; also return the arguments that are not its fields."""
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config), kwargs
    source = config if config is not None else name_or_path
    stored, kwargs = CromeVLMConfig.get_config_dict(source, **kwargs)
    if stored.get("model_type") != CromeVLMConfig.model_type:
        raise ValueError(
            f"{source} is a {stored.get('model_type')!r} model, expected 'crome_vlm'. Load it with its own class, or "
            "join its parts: CromeVLMForConditionalGeneration.from_backbones(vision=..., language=...)."
        )
    return CromeVLMConfig.from_dict(stored, return_unused_kwargs=True, **kwargs)


def _load_part(
    part: str, config: CromeVLMConfig, stored: Weights, loading: Loading, name_or_path: str | os.PathLike
) -> PreTrainedModel:
    """Load one backbone by its name, or from the stored weights if it has none."""
    vision = part == "vision_tower"
    prefix = "vision" if vision else "text"
    fields = ("model_name_or_path", "revision", "config", "quantization_config")
    name, revision, part_config, quantization = (getattr(config, f"{prefix}_{field}") for field in fields)
    if loading.dtype is None:
        loading = dataclasses.replace(loading, dtype=part_config.dtype)
    weights = {key.removeprefix(f"{part}."): tensor for key, tensor in stored.items() if key.startswith(f"{part}.")}
    if name is not None:
        try:
            if vision:
                return load_vision_tower(name, revision, part_config, quantization, loading)
            return load_language_model(name, revision, part_config, quantization, loading, weights)
        except OSError as error:
            raise OSError(
                f"{name_or_path} names {name!r} as its {part}, which cannot be loaded: {error}\nIf it has moved: "
                f"config = CromeVLMConfig.from_pretrained(...); config.{prefix}_model_name_or_path = '...'; "
                "pass config=config."
            ) from error
    model_class = vision_class(part_config) if vision else language_class(part_config)
    if hasattr(model_class, "_model_mapping"):  # auto classes need a name to take a state_dict
        model_class = model_class._model_mapping[type(part_config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    arguments = loading.for_part(part, quantization_config=quantization)
    arguments = {name: value for name, value in arguments.items() if name not in FILE_ARGUMENTS}
    model, info = model_class.from_pretrained(
        None, config=part_config, state_dict=weights, output_loading_info=True, **arguments
    )
    # A tower that lost its ...ForImageClassification head has no pooler. Its class creates one that nothing reads.
    missing = [f"{part}.{key}" for key in sorted(info["missing_keys"]) if not (vision and key.startswith("pooler."))]
    _report(name_or_path, missing, [f"{part}.{key}" for key in sorted(info["unexpected_keys"])], [])
    return model


def _load_qformer(config: CromeVLMConfig, loading: Loading) -> QFormer | None:
    """Load the Q-Former by its name, or create it to be filled from the stored weights; None if there is none."""
    if config.qformer_config is None:
        return None
    dtype = loading.dtype if loading.dtype is not None else config.qformer_config.dtype
    if config.qformer_model_name_or_path is not None:
        loading = dataclasses.replace(loading, dtype=dtype, device_map=None)
        arguments = loading.for_part("vision_tower", config.qformer_revision)
        return qformer_of(load_parts(config.qformer_model_name_or_path, **arguments))
    qformer = QFormer(config.qformer_config, config.num_query_tokens)
    return qformer.to(dtype) if isinstance(dtype, torch.dtype) else qformer


def _load_generation_config(model: Any, name_or_path: str | os.PathLike, files: dict[str, Any]) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name_or_path, **files)
    except OSError:
        return model.generation_config  # none is stored, so the language model's


def _load_adapter(
    model: Any, name_or_path: str | os.PathLike, files: dict[str, Any], adapter_kwargs: dict[str, Any]
) -> None:
    """Attach the PEFT adapter that is stored beside the composite, if there is one.

    Raises:
        OSError: there is none, although the composite's configuration or other files expect one.
    """
    path = adapter_kwargs.pop("_adapter_model_path", None)
    folder = Path(name_or_path)
    if path is None and find_adapter_config_file(name_or_path, **files) is not None:
        path = name_or_path
    remains = [name for name in (SAFETENSORS_WEIGHTS_NAME, STAGE_RECORD) if (folder / name).is_file()]
    if path is None and (remains or CromeVLMConfig.get_config_dict(name_or_path, **files)[0].get("has_adapter")):
        raise OSError(
            f"{name_or_path} has no adapter_config.json, and should: {remains or 'config.json says has_adapter'}. "
            "Copy all of it again, or pass adapter='ignore' to load the composite alone."
        )
    if path is not None:
        _check_adapter(path, files)
        try:
            model.load_adapter(path, adapter_kwargs=adapter_kwargs)
            load_copies(model, str(path), {name: value for name, value in files.items() if name != "proxies"})
        except SafetensorError as error:
            raise ValueError(
                f"The adapter in {path} is truncated or not a safetensors file ({error}). Copy the directory again."
            ) from error


def _check_adapter(path: str | os.PathLike, files: dict[str, Any]) -> None:
    """Check a CROME adapter's file first, since transformers loads it unchecked.

    Raises:
        ValueError: see `read_adapter_file`.
    """
    config = json.loads(Path(find_adapter_config_file(path, **files)).read_text(encoding="utf-8"))
    if config.get("peft_type") != "CROME":
        return
    hub_kwargs = {name: value for name, value in files.items() if name not in ("proxies", "subfolder")}
    adapter_file = read_adapter_file(str(path), files.get("subfolder"), **hub_kwargs)
    if adapter_file is not None:
        adapter_file.check_host(config.get("modules_to_save"), config.get("trainable_token_indices"))
        adapter_file.check_values()
