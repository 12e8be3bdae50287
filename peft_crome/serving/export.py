"""Write a model that vLLM serves with images and adapters by the plug-in."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..backbone.model import unwrapped
from ..sharing.provenance import describe_shape
from ..tuner import CromeWeights
from ..tuner.layer import crome_layers
from ..tuner.weights import DOWN, GATE
from ..utils.atomic import new_directory
from ..utils.templates import render
from ..vlm import CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from .folded import check_alone
from .host_files import copy_host, text_folded, write_composite, write_host
from .served import BASE_NAME, KEY, WEIGHTS, WEIGHTS_PREFIX, Served, ServedAdapter
from .vllm_plugin import PREFIX

logger = logging.getLogger(__name__)


def export(
    model: PeftModel,
    output_dir: str | Path,
    *,
    host: str | Path | None = None,
    revision: str | None = None,
    copy: bool | None = None,
    processor: Any = None,
    adapters: list[str] | None = None,
) -> None:
    """Write a directory for `vllm serve`: the host, and the branches that read images, of adapters on the model.

    A text branch is folded into the host's embedding table, so an adapter with one is exported alone. The model is
    not changed. Weights that are written from memory are read back and compared with it; files of `host` are copied,
    and only their configuration is compared.

    Args:
        model: model with one adapter or several.
        output_dir: a new directory, which appears when it is complete.
        host: the checkpoint of the model that the adapters are on, a directory or a Hub repository, whose files are
            copied unchanged. None: the weights in memory are written.
        revision: revision of the repository.
        copy: whether the copy has the host's weights. If not, vLLM reads them from the checkpoint. None: those of a
            directory are copied, and those of a repository are not.
        processor: processor to save instead of the checkpoint's.
        adapters: names of the adapters to write; None: all.
    Raises:
        FileExistsError: output_dir exists already.
        ValueError: see `read_served` and `fold`. Or vLLM has no class for the host, or only one without images; or
            `host` is of another shape than the model.
    """
    output = Path(output_dir)
    if output.exists():
        raise FileExistsError(f"{output} is there already; nothing was written. Name a new directory.")
    model = unwrapped(model, PeftModel)
    base = unwrapped(model)
    served, folded = read_served(model, adapters)
    composite = isinstance(base, CromeVLMForConditionalGeneration)
    if host is not None and (folded or composite):
        written = "A composite is" if composite else "A host with a text branch in its embedding table is"
        raise ValueError(f"{written} written from memory, so it has no files to copy. Leave host={str(host)!r} out.")
    name = type(base).__name__ if composite else (base.config.architectures or [type(base).__name__])[0]
    check_vllm(name)
    write: Any = write_composite if composite else partial(write_host, base)
    target = unwrapped(base.language_model) if composite else base
    if copy is None:
        copy = host is not None and Path(host).is_dir()
    if host is not None and not copy:
        place = Path(host).resolve() if Path(host).is_dir() else host
        served = Served(served.hidden_size, served.adapters, str(place), revision)
    with new_directory(output) as temporary:
        if host is not None:
            copy_host(host, temporary, weights=copy, revision=revision)
            _check_host(host, temporary, base.config)
            if processor is not None:
                processor.save_pretrained(temporary)
        else:
            with text_folded(model, target, base, [*served.adapters]) if folded else nullcontext():
                write(base, temporary, processor)
        _write_adapters(model, served, temporary, name)
        card = render("sharing/templates/served.md.jinja", name=host or name, served=served, folded=folded)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def read_served(model: PeftModel, names: list[str] | None = None) -> tuple[Served, bool]:
    """Describe adapters on a model; all of them, or those that are named.

    Returns:
        The description, and whether a text branch must be folded.
    Raises:
        ValueError: an adapter reads no images or is called "__base__", or one of several has a text branch.
    """
    check_alone(model)
    layers = list(crome_layers(unwrapped(model)))
    tables = [layer for _, layer in layers if isinstance(layer.table, torch.nn.Embedding)]
    names = [*model.peft_config] if names is None else names
    adapters = {}
    for name in names:
        config = model.peft_config[name]
        if name == BASE_NAME:
            raise ValueError(f"{BASE_NAME!r} is a request's name for the host alone. Give this adapter another name.")
        if any(layer.branches_of.get(name) for layer in tables) and len(names) > 1:
            raise ValueError(
                f"The adapter {name!r} has a text branch, which is folded into the host's embedding table, so an "
                f"engine serves one such adapter; the model has {sorted(names)}. Export it alone, or "
                "train with branches=['vision']."
            )
        sites: dict[str, list[str]] = {}
        for path, layer in layers:
            for branch in layer.branches_of.get(name, {}) if layer not in tables else ():
                sites.setdefault(branch, []).append(path)
        if not sites:
            raise ValueError(f"The adapter {name!r} has no branch that reads images. Write fold(...), and serve that.")
        adapters[name] = ServedAdapter(config.bottleneck_dim, config.gate_activation, sites)
    folded = any(layer.branches_of.get(name) for layer in tables for name in names)
    return Served(_weights(model).out_features, adapters), folded


def check_vllm(architecture: str) -> None:
    """Refuse a host that vLLM does not serve with images; without vLLM, log that this was not checked.

    Raises:
        ValueError: vLLM does not serve the host; names it.
    """
    if importlib.util.find_spec("vllm") is None:
        logger.warning("vLLM is not installed here, so whether it serves images of %s was not checked.", architecture)
        return
    import vllm

    from .vllm_plugin import register

    register()
    known = vllm.ModelRegistry.models.get(architecture)
    info = known.inspect_model_cls() if known is not None else None
    if info is None or not info.supports_multimodal or info.supports_multimodal_raw_input_only:
        lack = "has no class for" if info is None else "takes no images for"
        raise ValueError(
            f"vLLM {vllm.__version__} {lack} {architecture}. Serve it with transformers: model.generate(...)."
        )


def load_for_export(
    adapters: Mapping[str, str], model: str | None = None, revision: str | None = None
) -> tuple[PeftModel, dict[str, Any], Any]:
    """Put adapters on their host. The host's weights are loaded only if they have to be written again.

    Args:
        adapters: name -> directory or Hub repository.
        model: the host; None: the one that the adapters name.
        revision: the host's revision on the Hub; None: without `model`, the one that the adapters name.
    Returns:
        The model; `host` and `revision` for `export`, empty if the weights were loaded; then also the processor.
    Raises:
        ValueError: the adapters name no host or several, or transformers has no class for it.
    """
    configs = [PeftConfig.from_pretrained(path) for path in adapters.values()]
    hosts = {(config.base_model_name_or_path, revision or config.revision) for config in configs}
    if model is not None:
        hosts = {(model, revision)}
    unnamed = None in {name for name, _ in hosts}
    if unnamed or len(hosts) > 1:
        problem = "name no host" if unnamed else f"are for several hosts (name, revision), {sorted(hosts, key=str)}"
        raise ValueError(f"The adapters {sorted(adapters)} {problem}. Write --model and its directory or name.")
    ((host, revision),) = hosts
    of_hub = {} if revision is None else {"revision": revision}
    config = AutoConfig.from_pretrained(host, **of_hub)
    if isinstance(config, CromeVLMConfig):
        network = CromeVLMForConditionalGeneration.from_pretrained(host, adapter="ignore", **of_hub)
        return _attached(network, adapters), {}, _processor(host, network, of_hub)
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{host} is of the class {name}, which transformers {transformers.__version__} does not have."
        )
    kind = getattr(transformers, name)
    with torch.device("meta"):
        skeleton = kind(config)
    network = _attached(skeleton, adapters)
    if not read_served(network)[1]:
        return network, {"host": host, "revision": revision}, None
    return _attached(kind.from_pretrained(host, **of_hub), adapters), {}, AutoProcessor.from_pretrained(host, **of_hub)


def _processor(host: str, composite: Any, of_hub: Mapping[str, str]) -> Any:
    """Load a composite's processor, or build it from its backbones if the directory has none."""
    try:
        return AutoProcessor.from_pretrained(host, **of_hub)
    except (OSError, ValueError):
        return CromeVLMProcessor.from_backbones(config=composite.config)


def _check_host(host: str | Path, files: Path, config: Any) -> None:
    """Refuse files of another model than the one that the adapters are on, as far as configurations differ."""
    there = {"model_type": json.loads((files / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type")}
    if there["model_type"] == config.model_type:
        there = describe_shape(type(config).from_pretrained(files))
    different = [
        f"{key} {there[key]!r} and not {value!r}"
        for key, value in describe_shape(config).items()
        if there.get(key, value) != value
    ]
    if different:
        raise ValueError(
            f"{host} is not the model that the adapters are on: it has {', '.join(different)}. Name the directory or "
            "the repository of that model."
        )


def _attached(host: Any, adapters: Mapping[str, str]) -> PeftModel:
    first, *others = adapters.items()
    model = PeftModel.from_pretrained(host, first[1], adapter_name=first[0])
    for name, path in others:
        model.load_adapter(path, name)
    return model.eval()


def _write_adapters(model: PeftModel, served: Served, folder: Path, architecture: str) -> None:
    matrices = served_weights(model, [*served.adapters])
    weights = {name: value.float().cpu().contiguous() for name, value in matrices}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():  # vLLM reads only files in the index
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] |= dict.fromkeys(weights, WEIGHTS)
        index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": [PREFIX + architecture], KEY: served.to_dict()}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    written = load_file(folder / WEIGHTS)
    same = written.keys() == weights.keys() and all(torch.equal(written[key], weights[key]) for key in weights)
    if not same or Served.of(json.loads(path.read_text(encoding="utf-8"))) != served:
        raise ValueError(f"What was written to {folder} is not what was meant, and is not kept. Is the disk full?")


def served_weights(model: PeftModel, adapters: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of adapters that are not folded, with their names in the exported file."""
    tables = [layer for _, layer in crome_layers(unwrapped(model)) if isinstance(layer.table, torch.nn.Embedding)]
    folded = {kind + branch for layer in tables for branch in layer.branches for kind in (GATE, DOWN)}
    for key, value in _weights(model).state_dict().items():
        kind, adapter, _ = key.split(".")
        if adapter in adapters and kind not in folded:
            yield WEIGHTS_PREFIX + key, value


def _weights(model: PeftModel) -> Any:
    return next(module for module in model.modules() if isinstance(module, CromeWeights))
