"""Write a host's checkpoint from memory, or copy its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..backbone.model import separate, tied_weights, uncompiled, unwrapped
from ..sharing.written import check_model_files, check_ordinary
from ..tuner.without_sites import sites_out

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
# The last are Mistral's and Meta's. A folder's name is a pattern for `shutil`, and its files' for the Hub.
NOT_THE_HOSTS = ("README.md", "adapter_*", ".*", "consolidated*", "original", "original/*")


def write_host(target: Any, host: Any, folder: Path, processor: Any = None, **kwargs: Any) -> None:
    """Write a model, or a part of it, without the sites around its modules, and compare the files with it.

    Args:
        target: model or part to write.
        host: the whole model, with adapters on it.
        processor: saved beside the weights, if given.
        kwargs: arguments of `PreTrainedModel.save_pretrained`.
    Raises:
        ValueError: the model is in a form that a checkpoint cannot represent.
    """
    with sites_out(host), uncompiled(host):
        check_ordinary(target)
        target.save_pretrained(folder, **kwargs)
        check_model_files(folder, target, kwargs.get("save_original_format", True))
    if processor is not None:
        processor.save_pretrained(folder)


def write_composite(composite: Any, folder: Path, processor: Any = None) -> None:
    """Write a composite with all of its weights instead of its parts' names.

    Raises:
        ValueError: a part is quantized, or vLLM does not support the composite.
    """
    config = composite.config
    if config.qformer_config is not None or config.is_encoder_decoder:
        part = "a Q-Former, which reads the prompt," if config.qformer_config is not None else "an encoder-decoder"
        raise ValueError(f"vLLM does not serve a composite with {part}. Serve it with transformers: model.generate().")
    names = [(config, "vision_model_name_or_path"), (config, "text_model_name_or_path")]
    names += [(part, "_name_or_path") for part in (config.vision_config, config.text_config)]
    before = [getattr(*name) for name in names]
    try:
        for part, name in names:
            setattr(part, name, None if part is config else "")
        config.text_config.architectures = [type(unwrapped(composite.language_model)).__name__]
        write_host(composite, composite, folder, processor, save_original_format=False)
    finally:
        for (part, name), value in zip(names, before, strict=True):
            setattr(part, name, value)


@contextmanager
def text_folded(model: PeftModel, target: Any, host: Any, names: list[str] | None = None) -> Iterator[None]:
    """Fold the text branches of adapters into the embedding table, and untie the head, while the block runs.

    Args:
        names: names of the adapters; None: those that are active.
    """
    configs = {id(config): config for config in (target.config, target.config.get_text_config())}.values()
    tied = {id(config): config.tie_word_embeddings for config in configs if hasattr(config, "tie_word_embeddings")}
    with sites_out(host):
        shared = tied_weights(target)
    model.merge_adapter(names)
    separated: list[Any] = []
    try:
        for config in configs:
            config.tie_word_embeddings = False
        with sites_out(host), uncompiled(host):
            separated = separate(target, shared)
        yield
    finally:
        for module, name, weight in separated:
            setattr(module, name, weight)
        model.unmerge_adapter()
        for config in configs:
            if id(config) in tied:
                config.tie_word_embeddings = tied[id(config)]


def copy_host(host: str | Path, folder: Path, *, weights: bool, revision: str | None = None) -> None:
    """Copy a host's files unchanged: its configuration, tokenizer, processor and chat template, and its weights.

    Args:
        host: a directory, or a Hub repository.
        weights: whether to copy the weights as well.
    Raises:
        ValueError: the weights are not in safetensors files.
    """
    of_weights = [] if weights else [f"*{suffix}" for suffix in (*WEIGHTS, SAFE_WEIGHTS_INDEX_NAME)]
    left_out = [*NOT_THE_HOSTS, *of_weights]
    source = Path(host)
    if not source.is_dir():
        source = Path(snapshot_download(str(host), revision=revision, ignore_patterns=left_out))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    if weights and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{host} has no safetensors files. Write them: model.save_pretrained(...), and give their directory."
        )
