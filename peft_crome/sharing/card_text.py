"""Write the text of an adapter's model card: how to load it, its properties, and its training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..utils.templates import render
from .card_details import CardDetails
from .weight_file import read_header

IMPORT = "import peft_crome"
COMPOSITE = "crome_vlm"
THIS = "<this repository>"


def is_local(name: str | None) -> bool:
    """Whether a model's name is a folder on this machine."""
    return bool(name and Path(name).exists())


def hub_name(name: Any) -> str | None:
    """Return a model's or data set's name on the Hub; None for a folder, or a class's name."""
    if not isinstance(name, str) or "/" not in name or is_local(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_text(
    directory: Path, config: Any, details: CardDetails, where: str = THIS, subfolder: str | None = None
) -> str:
    """Write everything below the title.

    Args:
        directory: folder with the adapter's files.
        config: the adapter's configuration.
        where: the name to load it by.
        subfolder: subfolder of `where`, if the adapter is in one.
    """
    files = directory / subfolder if subfolder and (directory / subfolder).is_dir() else directory
    record = config.trained_on or {}
    base = config.base_model_name_or_path or "<the base model>"
    revision = config.revision or record.get("revision")
    pinned = f", revision={json.dumps(revision)}" if revision and hub_name(base) else ""
    inside = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    return render(
        "sharing/templates/adapter.md.jinja",
        config=config,
        details=details,
        record=record,
        base=base,
        revision=revision,
        is_local=is_local(base),
        is_composite=record.get("model_type") == COMPOSITE,
        pipeline_tag=pipeline_tag(record.get("model_type")),
        tower={name.replace("_", " "): value for name, value in (record.get("tower") or {}).items()},
        size=_size(files),
        source=json.dumps(base, ensure_ascii=False) + pinned,
        place=json.dumps(where, ensure_ascii=False) + inside,
    ).rstrip("\n")


def pipeline_tag(model_type: str | None) -> str | None:
    """Return the Hub's name of a host's task."""
    if model_type == COMPOSITE or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image-text-to-text"
    return "text-generation" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def _size(directory: Path) -> str:
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return ""
    tensors = read_header(path).values()
    count = sum(math.prod(shape) for shape, _ in tensors)
    dtypes = sorted({dtype for _, dtype in tensors})
    size = path.stat().st_size
    return (
        f"{count:,} weights, {f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'} ({', '.join(dtypes)})"
    )
