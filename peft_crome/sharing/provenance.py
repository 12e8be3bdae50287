"""Record the model that an adapter is trained on, and compare it when the adapter is loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from packaging.version import InvalidVersion, Version
from torch import nn

from ..backbone.model import Host, unwrapped
from ..version import __version__

# Keys of a quantization configuration that change the weights under the adapter.
QUANTIZATION = ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bits", "group_size", "fmt")
TOWER = ("model_type", "image_size", "patch_size")


def describe_backbone(model: nn.Module, host: Host, hidden_size: int) -> dict[str, Any]:
    """Describe a model in a few JSON values.

    Args:
        host: facts about the model. Eight of its rows distinguish two sets of weights, for any names and dtypes.
    """
    config = getattr(unwrapped(model), "config", None)
    return {
        "name_or_path": host.name,
        "revision": _commit(host.name),
        "model_type": getattr(config, "model_type", None),
        "hidden_size": hidden_size,
        "embedding_rms": None
        if host.rows is None
        else [float(f"{rms:.4g}") for rms in host.rows[:8].square().mean(-1).sqrt()],
        "tower": _describe_tower(config),
        "quantization": _describe_quantization(config),
        "versions": {
            "peft_crome": __version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
        },
    }


def describe_shape(config: Any) -> dict[str, Any]:
    """Describe a model by its configuration alone: architecture, width and depth of the language model, and tower."""
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "language model": text.model_type,
        "hidden_size": getattr(text, "hidden_size", None),
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
        **{f"tower's {name}": value for name, value in (_describe_tower(config) or {}).items()},
    }


def record_backbone(config: Any, here: dict[str, Any]) -> None:
    """Fill in `config.trained_on` on this backbone.

    One warning names all differences from the model that the adapter was trained on. Values that an older release
    did not record are not compared.
    """
    there = config.trained_on
    described = config._described or there is None
    problems = [] if described else differences(there, here)
    if problems:
        warnings.warn("\n".join(["This adapter was trained on another model:", *problems]), stacklevel=9)
    config._described = described
    # Even without a problem, values without effect may have changed: a path, a patch release.
    config.trained_on = here if described or not config.inference_mode else there


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Write a sentence for each difference between two descriptions, with a remedy."""
    sentences = []
    if not _same_backbone(there, here):
        sentences.append(
            f"- backbone: This adapter was trained on {there.get('name_or_path')!r} ({there.get('model_type')}"
            f"{_revision(there)}) and is loaded onto {here.get('name_or_path')!r} ({here.get('model_type')}"
            f"{_revision(here)}), whose embeddings differ. Its outputs mean nothing there unless you train it further."
        )
    tower, here_tower = (record.get("tower") or {} for record in (there, here))
    parts = [
        f"{name.replace('_', ' ')} {tower[name]!r}, here {here_tower[name]!r}"
        for name in tower
        if name in here_tower and here_tower[name] != tower[name]
    ]
    if parts:
        sentences.append(
            f"- vision tower: it was trained with {'; '.join(parts)}. Load the model at the resolution of the "
            "training, or train the adapter further."
        )
    if "quantization" in there and "quantization" in here and there["quantization"] != here["quantization"]:
        sentences.append(
            f"- quantization: it was trained on weights {_spell(there['quantization'])}, these are "
            f"{_spell(here['quantization'])}. Outputs shift a little; load the model with the same "
            "quantization_config to have the training's."
        )
    before, now = (record.get("versions") or {} for record in (there, here))
    moved = [name for name in now if _has_moved(before.get(name), now[name])]
    if moved:
        pins = " ".join(f"{name.replace('_', '-')}=={before[name]}" for name in moved)
        sentences.append(
            f"- versions: it was trained with {', '.join(f'{name} {before[name]}' for name in moved)}; here are "
            f"{', '.join(f'{name} {now[name]}' for name in moved)}. If outputs differ: pip install {pins}"
        )
    return sentences


def _commit(name: str) -> str | None:
    """Return the commit of a Hub repository if the cache has only one; transformers does not record the loaded one."""
    if Path(name).exists():
        return None
    snapshots = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    commits = {path.parent.name for path in snapshots.glob("*/config.json")}
    return commits.pop() if len(commits) == 1 else None


def _describe_tower(config: Any) -> dict[str, Any] | None:
    """Describe the vision tower: its architecture and the size of its images and patches, if they are fixed."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    values: dict[str, Any] = {name: getattr(vision, name, None) for name in TOWER}
    values["image_size"] = getattr(config, "image_size", None) or values["image_size"]  # set by the composite
    values["feature_layer"] = getattr(config, "vision_feature_layer", None)
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _describe_quantization(config: Any) -> dict[str, Any] | None:
    """Describe how the weights are quantized; None: they are not. The composite has a quantization for each part."""
    quantization = getattr(config, "quantization_config", None) or getattr(config, "text_quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return {name: _plain(values[name]) for name in QUANTIZATION if values.get(name) not in (None, False)}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(getattr(value, "value", value))


def _revision(record: dict[str, Any]) -> str:
    return f", revision {record['revision'][:12]!r}" if record.get("revision") else ""


def _spell(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return "not quantized"
    return "quantized by " + ", ".join(
        f"{k}={v!r}" if k != "quant_method" else repr(v) for k, v in quantization.items()
    )


def _has_moved(before: str | None, now: str | None) -> bool:
    """Whether a release may behave differently: another major one, another minor one below 1.0, or an older one."""
    if not before or not now or before == now:
        return False
    try:
        old, new = Version(before).release[:2], Version(now).release[:2]
    except InvalidVersion:
        return False
    return old[0] != new[0] or (old[0] == 0 and old != new) or new < old


def _same_backbone(there: dict[str, Any], here: dict[str, Any]) -> bool:
    known = [key for key in ("model_type", "hidden_size") if key in there]
    if any(there[key] != here[key] for key in known):
        return False
    old, new = there.get("embedding_rms"), here["embedding_rms"]
    return not old or not new or all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) for a, b in zip(old, new, strict=False))
