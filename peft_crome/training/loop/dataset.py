"""A recipe's data sets -> what the Trainer draws rows from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...data import check_files, load_rows, mix, mixture_probabilities, split_turns
from ...data.media_rows import rows_with_media
from ...data.mixture import normalized
from ...data.sources import FEATURES, file_digest
from ..errors import RecipeError
from ..recipe.schema import Data, Recipe

Sets = list[tuple[Data, Any]]  # a data set of a recipe, and its rows

logger = logging.getLogger(__name__)


def load_sources(recipe: Recipe) -> list[Any]:
    """Each data set of a recipe, in its order; every image file is there.

    Raises:
        FileNotFoundError, ValueError: as `load_rows` and `check_files`.
    """
    sources = [load_rows(**data.model_dump(exclude={"weight"})) for data in recipe.data]
    for source in sources:
        if isinstance(source, Dataset):
            check_files(source)
    return sources


def content_of(data: Data, source: Any) -> str | None:
    """What tells whether a data set is still the one that a run began with.

    Returns:
        A digest of a file's bytes, or of a table; None: nobody can tell, as of a stream from the Hub.
    """
    if isinstance(source, Dataset):
        return source._fingerprint
    if Path(data.path).is_file():
        return file_digest(Path(data.path))
    files = sorted(path for path in Path(data.path).rglob("*") if path.is_file())  # none, of a name of the Hub
    return "".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns} " for path in files) or None


def without_text(sets: Sets) -> Sets:
    """The data sets that have rows with an image, with these rows alone; a warning says how many are left out.

    Raises:
        RecipeError: nothing is left.
    """
    kept = []
    for data, source in sets:
        rows = rows_with_media(source)
        if isinstance(source, Dataset) and len(rows) < len(source):
            logger.warning(
                f"data: {len(source) - len(rows):,} of {len(source):,} rows in {data.path} are text alone. Nothing "
                "that trains here learns from text, so they are left out. To train on them, write adapter: {branches: "
                "[text, vision]}, which changes prompts without an image."
            )
        if not isinstance(rows, Dataset) or len(rows):
            kept.append((data, rows))
    if not kept:
        raise RecipeError(
            "data: no row has an image, and nothing that trains here learns from text. Name data with images (see "
            "peft-crome doctor), or write adapter: {branches: [text, vision]}."
        )
    return kept


def training_rows(recipe: Recipe, sets: Sets, split: bool) -> Any:
    """The mixture that a recipe describes.

    Args:
        sets: of the recipe's data sets, those to draw from, with what `load_sources` gave for each.
        split: whether each answer becomes a row (see `ConversationCollator`).
    """
    sources = [source for _, source in sets]
    weights = [data.weight for data, _ in sets if data.weight is not None]
    probabilities = normalized(weights) if weights else None  # the recipe has seen to it that all have one, or none
    if recipe.mixture is not None and len(sources) > 1:
        sizes = [len(source) for source in sources]
        probabilities = mixture_probabilities(sizes, recipe.mixture.temperature)
    if split:
        sources = [source.map(_split, batched=True, features=FEATURES) for source in sources]
    return mix(sources, probabilities, recipe.training.seed)


def _split(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    parts = list(split_turns(rows))
    return {key: [part[key] for part in parts] for key in batch}
