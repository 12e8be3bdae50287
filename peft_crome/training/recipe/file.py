"""Read a recipe's YAML file, with an optional preset and overrides, for `schema.py` to validate."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import RecipeError
from ..stages import STAGES
from .schema import SECTIONS, Recipe, keys_at

PRESETS = tuple(STAGES)
# Settings of a preset for its tower, which do not apply to another tower.
TOWER_KEYS = ("backbones.image_size", "backbones.vision_feature_layer", "images.mean", "images.std")


class _Loader(yaml.SafeLoader):
    """YAML loader that reads 1e-5 as a number (YAML 1.1 makes it text) and refuses repeated keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping as written, before `<<` adds the keys of others."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            before = first.setdefault((key.tag, key.value), key)
            if before is not key:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key.value!r} stands in line {before.start_mark.line + 1} and again in line "
                    f"{key.start_mark.line + 1}, so one of them would be left aside; take one out",
                    key.start_mark,
                )
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: a YAML file, the name of a preset ("pretrain", "instruct", "finetune"), or a mapping. A key `preset:`
            fills in everything that the recipe leaves out.
        overrides: dotted keys and their values, as in {"training.max_steps": 100}.
    Raises:
        RecipeError: a key is unknown, missing or has a wrong value; lists all of them.
        FileNotFoundError: there is neither such a file nor such a preset.
    """
    values, name = _read(source)
    preset, explicit_values = values.pop("preset", None), copy.deepcopy(values)
    tower = None  # the preset's
    if preset is not None:
        if preset not in PRESETS:
            raise RecipeError(f"{name}: preset={preset!r} is unknown; expected one of {list(PRESETS)}.")
        base = yaml.load(preset_text(preset), _Loader)
        tower = base.get("backbones", {}).get("instructblip")
        values = _merge(base, values)
    for key, value in (overrides or {}).items():
        for place in (values, explicit_values):
            _set(place, key, copy.deepcopy(value), name)
            if key == "backbones.vision" and "backbones.instructblip" not in (overrides or {}):
                place["backbones"].pop("instructblip", None)
    if preset is not None:
        _leave_out_what_was_for_others(tower, values, explicit_values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise RecipeError("\n".join([f"{name} is not valid:", *(f"  {line}" for line in lines)])) from None


def preset_text(name: str) -> str:
    """Return the YAML of a preset, to copy and complete."""
    return (files(__package__) / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """Parse command-line settings, "training.max_steps=100", for `load_recipe`; values are YAML.

    Raises:
        RecipeError: a setting has no "=" or no key, or its value is not YAML.

    Example:
        >>> parse_overrides(["training.max_steps=100", "previous=null"])
        {'training.max_steps': 100, 'previous': None}
    """
    overrides = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {setting!r} is not a setting; write --set training.max_steps=100.")
        try:
            overrides[key.strip()] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is not YAML ({error}).") from error
    return overrides


def is_recipe(name: str) -> bool:
    """Whether a name is a recipe, a preset or a YAML file, and not a model."""
    return name in PRESETS or Path(name).is_file() or Path(name).suffix in (".yaml", ".yml")


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "the recipe"
    path = Path(source)
    if not path.is_file():
        if str(source) in PRESETS:
            return {"preset": str(source)}, f"preset {source!r}"
        raise FileNotFoundError(f"{source} is neither a file nor a preset; presets are {list(PRESETS)}.")
    name = str(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not text in UTF-8 ({error}); expected a recipe in YAML.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{name} holds {type(values).__name__}; expected keys such as `stage: pretrain`.")
    return values, name


def _leave_out_what_was_for_others(
    tower: str | None, values: dict[str, Any], explicit_values: Mapping[str, Any]
) -> None:
    """Drop a preset's settings for its backbones if a recipe names others.

    Args:
        tower: the InstructBLIP checkpoint that the preset names.
    """
    backbones = explicit_values.get("backbones")
    if not isinstance(backbones, Mapping):
        return
    if "vision" in backbones and "instructblip" not in backbones:
        values["backbones"].pop("instructblip", None)
    if backbones.get("vision") is not None or backbones.get("instructblip", tower) != tower:
        for key in TOWER_KEYS:
            section, _, name = key.partition(".")
            explicit_keys, held = explicit_values.get(section), values.get(section)
            if isinstance(held, dict) and name not in (explicit_keys if isinstance(explicit_keys, Mapping) else {}):
                held.pop(name, None)
    language = str(backbones.get("language", "vicuna")).lower()
    if "chat_template" not in explicit_values and "vicuna" not in language:
        values.pop("chat_template", None)  # the presets have Vicuna's template


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _set(values: dict[str, Any], key: str, value: Any, name: str) -> None:
    *path, last = key.split(".")
    place: Any = values
    for number, word in enumerate(path):
        if isinstance(place, list) and word.isdigit() and int(word) < len(place):
            place = place[int(word)]
            continue
        if not isinstance(place, dict):
            raise RecipeError(f"{name}: cannot set {key!r}: {'.'.join(path[:number])} has no keys.")
        if place.get(word) is None:
            place[word] = {}
        place = place[word]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"{name}: cannot set {key!r}: {'.'.join(path)} has no such entry.")


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])
        near = difflib.get_close_matches(name, keys_at(detail["loc"][:-1]), n=1)
        near = near or [f"{section}.{name}" for section in SECTIONS if name in keys_at((section,))]
        return f"{key}: no such key" + (f"; did you mean {near[0]!r}?" if near else "")
    if detail["type"] == "missing":
        return f"{key}: missing; write it into the recipe, or --set {key}=..."
    message = detail["msg"].removeprefix("Value error, ")
    suffix = "" if isinstance(detail["input"], Mapping) else f" (given: {detail['input']!r})"
    return f"{key}: {message}{suffix}"
