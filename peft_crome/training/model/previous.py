"""Find the directory that a stage starts from and its backbones, and compare it with the recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, InstructBlipQFormerConfig
from transformers.utils import is_bitsandbytes_available

from ...tuner import CromeConfig
from ...vlm import CromeVLMConfig, CromeVLMProcessor
from ...vlm.configuration_crome_vlm import IMAGE_OPTIONS
from ..errors import StageError
from ..quantization import Bits, bits_of
from ..recipe.schema import Recipe

QFORMER_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "cross_attention_frequency",
)  # fmt: skip
SIZES = ("model_type", "hidden_size", "num_hidden_layers")  # checked for a language model, whose table may be resized

logger = logging.getLogger(__name__)


def local_directory(previous: str) -> Path:
    """Return a directory, or download the files of a Hub repository once."""
    if Path(previous).exists() or previous.count("/") != 1 or previous.startswith((".", "/", "~")):
        return Path(previous).expanduser()
    try:
        return Path(snapshot_download(previous))
    except (OSError, ValueError) as error:
        raise StageError(
            f"previous: {previous!r} is neither a directory nor a Hub repository that can be reached ({error}). Point "
            "it at a directory that `peft-crome train` has finished."
        ) from error


def located(name: Any) -> Any:
    """Return a folder's absolute path, which is valid everywhere on this machine, or a Hub name unchanged."""
    return str(Path(name).resolve()) if isinstance(name, str) and Path(name).is_dir() else name


def load_named(kind: Any, key: str, name: str, revision: str | None = None) -> Any:
    """Load a configuration or a tokenizer from a folder or the Hub.

    Args:
        kind: `AutoConfig` or `AutoTokenizer`.
        key: the recipe's key that names it.
    Raises:
        StageError: it cannot be loaded; names the key and the reason.
    """
    try:
        return kind.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise StageError(f"{key}: {name!r} cannot be loaded: {error}") from error


def check_installed(key: str, bits: Bits | None) -> None:
    """Check that bitsandbytes is installed if a recipe's key asks for it.

    Raises:
        StageError: it is missing.
    """
    if bits is not None and not is_bitsandbytes_available():
        raise StageError(f'{key}: {bits!r} needs bitsandbytes. Write: pip install "peft-crome[quantization]"')


def follow_moved_backbones(recipe: Recipe, composite: CromeVLMConfig) -> None:
    """Replace missing folders in a directory's configuration by the places in the recipe's backbones.

    Raises:
        StageError: the recipe names no place, or another language model is in it.
    """
    backbones, tower = recipe.backbones, composite.vision_model_name_or_path
    gone = [
        field
        for field in ("vision_model_name_or_path", "qformer_model_name_or_path", "text_model_name_or_path")
        if (stored := getattr(composite, field)) and Path(stored).is_absolute() and not Path(stored).exists()
    ]
    if gone and backbones is None:
        raise StageError(
            f"{recipe.previous} names {[getattr(composite, field) for field in gone]}, which are not there. If they "
            "have moved, write the `backbones` of the stage before into this recipe, with the places where they are "
            "now."
        )
    for field in gone:
        stored = getattr(composite, field)
        if backbones is None or (field.startswith("qformer") and stored != tower):
            continue
        name = backbones.language if field.startswith("text") else backbones.instructblip or backbones.vision
        if field.startswith("text"):
            _check_same_language_model(str(name), composite.text_config)
        logger.warning("%s is not there; %s is taken from %s instead.", stored, field, name)
        setattr(composite, field, located(name))


def _check_same_language_model(name: str, stored: Any) -> None:
    text_config = load_named(AutoConfig, "backbones.language", name).get_text_config(decoder=True)
    stored = stored.get_text_config(decoder=True)
    different = [
        f"{key} {getattr(text_config, key)!r}, not {getattr(stored, key)!r}"
        for key in SIZES
        if getattr(text_config, key, None) != getattr(stored, key, None)
    ]
    if different:
        raise StageError(f"backbones.language: {name!r} is not the model that was trained with: {different}.")


def check_same(recipe: Recipe, composite: CromeVLMConfig, adapter: CromeConfig) -> None:
    """Compare a recipe's architecture with the directory that it starts from.

    Raises:
        StageError: lists every difference.
    """
    different = []
    if recipe.backbones is not None:
        backbones, stored = recipe.backbones, _stored(composite)
        recipe_values = {key: getattr(backbones, key) for key in backbones.model_fields_set if key != "qformer"}
        recipe_values["vision"] = recipe_values.pop("instructblip", None) or recipe_values.get("vision")
        if backbones.qformer is not None:
            whole = InstructBlipQFormerConfig(**backbones.qformer).to_dict()
            sizes = [key for key in QFORMER_SIZES if key in whole]
            recipe_values |= {f"qformer.{key}": whole[key] for key in dict.fromkeys([*backbones.qformer, *sizes])}
        if composite.qformer_config is not None and backbones.qformer is None and backbones.instructblip is None:
            different.append("backbones.qformer: none in the recipe, one there")
        different += [
            f"backbones.{key}: {value!r} in the recipe, {stored.get(key)!r} there"
            for key, value in recipe_values.items()
            if key != "qformer_tokenizer" and located(value) != stored.get(key)
        ]
    check_same_adapter(recipe, adapter, different)


def check_same_adapter(recipe: Recipe, adapter: CromeConfig, different: Sequence[str] = ()) -> None:
    """Compare a recipe's adapter with the one that it starts from.

    Args:
        different: differences found before.
    Raises:
        StageError: lists every difference.
    """
    different = list(different)
    for key in sorted(recipe.adapter.model_fields_set - {"dropout", "init_weights"} if recipe.adapter else ()):
        a, b = getattr(recipe.adapter, key), getattr(adapter, key)
        different += [f"adapter.{key}: {a!r} in the recipe, {b!r} there"] if a != b else []
    if different:
        raise StageError(
            f"{recipe.previous} has another architecture than the recipe: {'; '.join(different)}. Leave "
            "`backbones` and `adapter` out to take the directory's, or start from another directory."
        )


def go_on_with(adapter: CromeConfig, recipe: Recipe) -> None:
    """Let an earlier adapter train, with the dropout from a recipe."""
    adapter.inference_mode = False
    if recipe.adapter is not None and "dropout" in recipe.adapter.model_fields_set:
        adapter.dropout = recipe.adapter.dropout


def check_reader(recipe: Recipe, processor: CromeVLMProcessor) -> None:
    """Check that the recipe's tokenizer for the Q-Former is the directory's."""
    name = recipe.backbones.qformer_tokenizer if recipe.backbones is not None else None
    if name is None:
        return
    tokenizer = load_named(AutoTokenizer, "backbones.qformer_tokenizer", name)
    reader = processor.qformer_tokenizer
    if reader is None or tokenizer.get_vocab() != reader.get_vocab():
        there = "no tokenizer for a Q-Former" if reader is None else "another tokenizer for its Q-Former"
        raise StageError(
            f"{recipe.previous} has {there}, and the recipe says backbones.qformer_tokenizer: {name!r}. Take that key "
            "out, or start from another directory."
        )


def _stored(composite: CromeVLMConfig) -> dict[str, Any]:
    """Describe the backbones of a directory with a recipe's keys."""
    dtype: Any = getattr(composite.text_config, "dtype", None)
    reader: Any = composite.qformer_config
    return {
        "language": composite.text_model_name_or_path,
        "text_revision": composite.text_revision,
        "vision": composite.vision_model_name_or_path,
        "vision_revision": composite.vision_revision,
        "image_size": composite.image_height_width[0],
        **{name: getattr(composite, name) for name in IMAGE_OPTIONS},
        "num_query_tokens": None if reader is None else composite.num_query_tokens,
        "quantization": bits_of(composite.text_quantization_config),
        "vision_quantization": bits_of(composite.vision_quantization_config),
        "dtype": str(dtype).removeprefix("torch."),
        **({} if reader is None else {f"qformer.{key}": value for key, value in reader.to_dict().items()}),
    }
