"""Check the fields of a configuration."""

from __future__ import annotations

import re
import sys
from typing import Any

import peft.auto

LARGEST_BOTTLENECK = 16_384  # above any language model's width; a file that asks for more attacks memory
LONGEST_NAME = 4096  # characters
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\"`<>|]")  # would end the code block of a message or of the card
GATE_ACTIVATIONS = ("silu", "sigmoid")
TRAINED_ON: dict[str, type] = {
    "name_or_path": str,
    "revision": str,
    "model_type": str,
    "hidden_size": int,
    "embedding_rms": list,
    "tower": dict,
    "quantization": dict,
    "versions": dict,
}
INIT_SCHEMES = ("scaled", "normal")


def check_config(config: Any) -> None:
    """Refuse wrong fields of a `CromeConfig`.

    Raises:
        ValueError, TypeError: a field is wrong; names the field, the value and what to write.
    """
    if not isinstance(config.inference_mode, bool):
        raise TypeError(f"inference_mode={config.inference_mode!r} is not a bool. Write inference_mode=False.")
    width = config.bottleneck_dim
    if isinstance(width, bool) or not isinstance(width, (int, type(None))):
        raise TypeError(f"bottleneck_dim={width!r} is not an int. Write bottleneck_dim=256, or None.")
    if width is not None and not 1 <= width <= LARGEST_BOTTLENECK:
        raise ValueError(
            f"bottleneck_dim={width} is not between 1 and {LARGEST_BOTTLENECK}. Write bottleneck_dim=256, or None."
        )
    if config.gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(
            f"gate_activation={config.gate_activation!r} is unknown; expected one of {GATE_ACTIVATIONS}. "
            "Write gate_activation='silu'."
        )
    if isinstance(config.dropout, bool) or not isinstance(config.dropout, (int, float)) or not 0 <= config.dropout < 1:
        raise ValueError(f"dropout={config.dropout!r} is not a probability in [0, 1). Write dropout=0.0.")
    if not isinstance(config.init_weights, bool) and config.init_weights not in INIT_SCHEMES:
        raise ValueError(
            f"init_weights={config.init_weights!r} is unknown; expected True, False or one of {INIT_SCHEMES}. "
            "Write init_weights=True."
        )
    if isinstance(config.modules_to_save, str):
        raise TypeError(f"modules_to_save is a string. Write modules_to_save=[{config.modules_to_save!r}].")
    if config.modules_to_save is not None and not _is_names(config.modules_to_save):
        raise TypeError(
            f"modules_to_save={config.modules_to_save!r} is not a list of names. Write modules_to_save=None."
        )
    if config.target_modules is not None:
        raise ValueError(
            f"target_modules={config.target_modules!r}: CROME's modules are named by branch. "
            f"Write branches={{'vision': {config.target_modules!r}}}."
        )
    _check_branches(config.branches)
    _check_tokens(config.trainable_token_indices)
    _check_origin(config)
    _check_trained_on(config.trained_on)


def _check_branches(branches: Any) -> None:
    example = "branches=['text', 'vision'], or branches={'vision': ['multi_modal_projector']}"
    if branches is None:
        return
    if not isinstance(branches, (list, tuple, dict)) or not branches:
        raise TypeError(f"branches={branches!r} is neither a list of names nor a dict of modules. Write {example}.")
    for name in branches:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"branches: the name {name!r} is not an identifier. Write {example}.")
    if not isinstance(branches, dict):
        twice = sorted({name for name in branches if list(branches).count(name) > 1})
        if twice:
            raise ValueError(f"branches={branches!r} names {twice} twice. Write each once: {example}.")
        return
    for name, modules in branches.items():
        names = [modules] if isinstance(modules, str) else modules
        if not isinstance(names, (list, tuple)) or not names or not all(n and isinstance(n, str) for n in names):
            raise TypeError(f"branches[{name!r}]={modules!r} is neither a list of names nor a regex. Write {example}.")
        long = [n for n in names if len(n) > LONGEST_NAME]
        if long:
            raise ValueError(
                f"branches[{name!r}]: {long[0][:40]!r}... has {len(long[0])} characters. Write {example}."
            )


def _check_tokens(indices: Any) -> None:
    lists = list(indices.values()) if isinstance(indices, dict) else [] if indices is None else [indices]
    names = list(indices) if isinstance(indices, dict) else []
    are_ids = all(
        isinstance(ids, (list, tuple)) and ids and all(type(i) is int and i >= 0 for i in ids) for ids in lists
    )
    if not are_ids or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"trainable_token_indices={str(indices)[:60]} is not a list of token ids. Write "
            "trainable_token_indices=[32000, 32001], or {'embed_tokens': [32000, 32001]}."
        )


def _check_origin(config: Any) -> None:
    """Check what a file states about the model's origin: PEFT passes it to `from_pretrained` and imports modules."""
    for name in ("base_model_name_or_path", "revision"):
        value = getattr(config, name)
        if value is not None and (
            not isinstance(value, str) or UNPRINTABLE.search(value) or len(value) > LONGEST_NAME
        ):
            raise ValueError(
                f"{name}={str(value)[:60]!r} is neither a name nor a path, which hold no quotes, angle brackets or "
                f"control characters. Write {name}=None."
            )
    mapping = config.auto_mapping
    if mapping is None:
        return
    names = ("base_model_class", "parent_library")
    values: list[Any] = [mapping.get(name) for name in names] if isinstance(mapping, dict) else []
    if not values or not all(isinstance(v, str) and v.replace(".", "").isidentifier() for v in values):
        raise ValueError(
            f"auto_mapping={str(mapping)[:100]} does not name a class and a module. Write auto_mapping=None, and load "
            "the base model yourself: PeftModel.from_pretrained(model, ...)."
        )
    # PEFT before 0.21.2 imports any module that is named.
    asks = hasattr(peft.auto, "get_default_import_allowlist")
    if not asks and values[1] not in sys.modules and not values[1].startswith("transformers."):
        raise ValueError(
            f"auto_mapping names {values[1]!r}, which is not imported, and this PEFT would import it unasked. If you "
            f"trust it: import {values[1]}, and load again."
        )


def _check_trained_on(record: Any) -> None:
    if record is None:
        return
    if not isinstance(record, dict):
        raise TypeError(f"trained_on={str(record)[:60]} is not a dict. Write trained_on=None.")
    for key, allowed in TRAINED_ON.items():
        value = record.get(key)
        parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        text = [part for part in parts if isinstance(part, str)]
        numbers = key != "embedding_rms" or all(type(part) in (int, float) for part in parts if value is not None)
        strings = key != "versions" or len(text) == len(parts) or value is None
        printable = all(part.isprintable() and len(part) <= LONGEST_NAME for part in text)
        if value is not None and not (isinstance(value, allowed) and numbers and strings and printable):
            raise TypeError(f"trained_on[{key!r}]={str(value)[:60]} is of a wrong type. Write trained_on=None.")


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(
        n and isinstance(n, str) and len(n) <= LONGEST_NAME for n in value
    )
