"""Write a stage's directory as a complete Hub repository or not at all, and check it when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME

from ...sharing.card_details import describe_adapter
from ...sharing.stage_record import STAGE_RECORD
from ...sharing.written import check_files
from ...utils.atomic import new_directory
from ..errors import StageError
from .run_folder import file_sizes

RECORD = STAGE_RECORD  # written last: a directory without it is not complete


def save_stage(model: PeftModel, processor: Any, directory: str | Path, record: dict[str, Any], card: str) -> None:
    """Write the composite with the trained weights, the adapter, the processor, the card and the record.

    The adapter is detached from the model: `model.unload()` puts the trained modules in their places.

    Args:
        model: the trained PEFT model around a composite.
        processor: the composite's processor.
        directory: a directory that does not exist or is empty. It appears under its name when it is complete.
        record: a description of the stage in JSON values. Its key "stages" holds the list of all stages.
        card: the text of README.md.
    Raises:
        StageError: the directory is not empty.
        ValueError: the written weights differ from the model's. Then no directory is left.
    """
    directory = Path(directory)
    check_free(directory)
    name = model.active_adapter
    adapter = {key: value for key, value in get_peft_model_state_dict(model).items() if ".crome_" in key}
    parameter_names = [key for key, _ in model.named_parameters() if ".crome_" in key and f".{name}." in key]
    config = model.peft_config[name]
    composite = model.unload()
    with new_directory(directory) as target:
        composite.config.has_adapter = True
        try:
            composite.save_pretrained(target)
        finally:
            composite.config.has_adapter = False
        processor.save_pretrained(target)
        adapter = {key: value.detach().contiguous() for key, value in adapter.items()}
        save_file(adapter, target / SAFETENSORS_WEIGHTS_NAME)
        check_files(target, [key.replace(f".{name}.", ".") for key in parameter_names], SAFETENSORS_WEIGHTS_NAME)
        values = config.to_dict() | {
            "modules_to_save": None,  # the composite beside it holds them
            "base_model_name_or_path": None,
            "inference_mode": True,
            "trained_on": (config.trained_on or {}) | {"name_or_path": composite.config.text_model_name_or_path},
        }
        text = json.dumps(values, indent=2, sort_keys=True, default=list)  # a set as a list, as PEFT does
        (target / ADAPTER_CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
        (target / "README.md").write_text(card, encoding="utf-8")
        _write_record(target, record)


def save_adapter(model: PeftModel, processor: Any, directory: str | Path, record: dict[str, Any]) -> None:
    """Write an adapter of a separate model: weights, processor, card and record. The model is not changed.

    Args:
        model: the trained PEFT model.
        processor: the model's processor, with which the adapter was trained.
        directory: a directory that does not exist or is empty. It appears under its name when it is complete.
        record: a description of the run in JSON values. Its key "stages" holds the list of all runs.
    Raises:
        StageError: the directory is not empty.
        ValueError: the written weights differ from the model's. Then no directory is left.
    """
    directory = Path(directory)
    check_free(directory)
    name = model.active_adapter
    data = [item["path"] for stage in record["stages"] for item in stage["data"]]
    with new_directory(directory) as target:
        # A saved padding state loads as max_length=None, with which Gemma's processors refuse sound.
        processor.tokenizer.backend_tokenizer.no_padding()
        processor.tokenizer.backend_tokenizer.no_truncation()
        processor.save_pretrained(target)
        describe_adapter(model, name, datasets=list(dict.fromkeys(data)), record=record)
        model.save_pretrained(target)
        check_files(target, list(get_peft_model_state_dict(model)), SAFETENSORS_WEIGHTS_NAME)
        _write_record(target, record)


def check_free(directory: str | Path) -> None:
    """Refuse to overwrite files.

    Raises:
        StageError: the directory contains files, is a file, or cannot be created.
    """
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise StageError(f"{directory} exists already and is not overwritten. Name another output, or move it away.")
    parent = next(folder for folder in directory.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StageError(f"{directory} cannot be written: {parent} is not a folder that you may write to.")


def is_finished(directory: Path, checkpoints: Path, recipe: dict[str, Any]) -> bool:
    """Whether a run of this recipe wrote its directory and was interrupted before it removed its checkpoints."""
    if not (directory / RECORD).is_file() or not checkpoints.is_dir():
        return False
    return read_record(directory)["stages"][-1]["recipe"] == recipe


def read_record(directory: str | Path) -> dict[str, Any]:
    """Read the record of a stage's directory, and check that all its files are complete.

    Raises:
        StageError: the directory is not a stage's, or a file is missing or of another size.
    """
    directory = Path(directory)
    path = directory / RECORD
    if not path.is_file():
        contents = sorted(file.name for file in directory.iterdir())[:8] if directory.is_dir() else "no such directory"
        raise StageError(
            f"{directory} is not the directory of a complete stage: it has no {RECORD} ({contents}). Point "
            "`previous` at a directory that `peft-crome train` has finished, or run that stage again."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, _ = record["files"], record["stages"][-1]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise StageError(f"{path} cannot be read ({error!r}). Copy the directory again.") from error
    sizes = file_sizes(directory)
    faulty = [
        f"{name} ({'missing' if name not in sizes else 'of another size'})"
        for name, size in files.items()
        if name != "README.md" and sizes.get(name) != size and (name != CONFIG_NAME or name not in sizes)
    ]
    if CONFIG_NAME in sizes and "config" in record and record["config"] != _config_digest(directory):
        faulty.append(f"{CONFIG_NAME} (of other content, beside where the backbones are)")
    if faulty:
        raise StageError(f"{directory} is incomplete: {', '.join(faulty)}. Copy the directory again.")
    return record


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record last, since it has the sizes of all files."""
    text = json.dumps({**record, "files": file_sizes(directory), "config": _config_digest(directory)}, indent=2)
    (directory / RECORD).write_text(f"{text}\n", encoding="utf-8")


def _config_digest(directory: Path) -> str | None:
    """Hash config.json without the names of places, which may move; None: it cannot be read."""

    def without_places(value: dict[str, Any]) -> dict[str, Any]:
        return {key: item for key, item in value.items() if not key.endswith("name_or_path")}

    try:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"), object_hook=without_places)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
