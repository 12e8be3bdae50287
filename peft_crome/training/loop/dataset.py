"""Build the data set that the Trainer draws rows from, out of a recipe's data sets."""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...data import check_files, load_rows, mix, mixture_probabilities, split_turns
from ...data.media import FIELDS, NOUNS
from ...data.media_rows import rows_with_media
from ...data.mixture import normalized
from ...data.sources import FEATURES, file_digest
from ..errors import RecipeError
from ..recipe.schema import Data, Recipe

FIRST = 1000  # one of the first rows of a stream must teach something
Sets = list[tuple[Data, Any]]  # pairs of a recipe's data set and its rows

logger = logging.getLogger(__name__)


def load_sets(recipe: Recipe) -> Sets:
    """Load each data set of a recipe, in its order, and check that every image file exists.

    Raises:
        FileNotFoundError, ValueError: as in `load_rows` and `check_files`.
    """
    sets = [(data, load_rows(**data.model_dump(exclude={"weight"}))) for data in recipe.data]
    for _, source in sets:
        if isinstance(source, Dataset):
            check_files(source)
    return sets


def content_of(data: Data, source: Any) -> str | None:
    """Fingerprint a data set, to check whether it is still the one that a run began with.

    Returns:
        A digest of a file's bytes or of a table; None: unknown, as for a stream from the Hub.
    """
    if isinstance(source, Dataset):
        return source._fingerprint
    if Path(data.path).is_file():
        return file_digest(Path(data.path))
    files = sorted(path for path in Path(data.path).rglob("*") if path.is_file())  # no files for a Hub name
    return "".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns} " for path in files) or None


def teaching_sets(sets: Sets, kinds: Set[str]) -> Sets:
    """Select the data sets with rows from which something learns, reduced to these rows.

    A warning gives the number of rows that are left out; for a stream, only that some are.

    Args:
        kinds: kinds of media that reach trained weights, from `media_that_teach`.
    Raises:
        RecipeError: no row is left, or the first rows of a stream have none of these media.
    """
    nouns = " or ".join(NOUNS[kind] for kind in FIELDS if kind in kinds) or "medium"
    remedy = (
        "To train on words as well, write adapter: {branches: [text, vision]}, which changes prompts without an image."
    )
    kept = []
    for data, source in sets:
        rows = rows_with_media(source, kinds)
        if not isinstance(source, Dataset):
            if not any(True for _ in rows_with_media(source.take(FIRST), kinds)):
                raise RecipeError(
                    f"data: none of the first {FIRST} rows of {data.path} has any {nouns}, and nothing else teaches "
                    f"what trains here. Take the set out. {remedy}"
                )
            logger.warning(f"data: rows of {data.path} without any {nouns} are left out as they are read. {remedy}")
        elif len(rows) < len(source):
            logger.warning(
                f"data: {len(source) - len(rows):,} of {len(source):,} rows in {data.path} have no {nouns}. Nothing "
                f"that trains here learns from them, so they are left out. {remedy}"
            )
        if not isinstance(rows, Dataset) or len(rows):
            kept.append((data, rows))
    if not kept:
        raise RecipeError(
            f"data: no row has any {nouns}, and nothing else teaches what trains here. Name other data: peft-crome "
            f"doctor counts rows without an image. {remedy}"
        )
    return kept


def training_rows(recipe: Recipe, sets: Sets, split: bool) -> Any:
    """Mix the data sets as a recipe describes.

    Args:
        sets: the data sets of `load_sets` to draw from.
        split: whether each answer becomes a row (see `ConversationCollator`).
    """
    sources = [source for _, source in sets]
    weights = [data.weight for data, _ in sets if data.weight is not None]
    probabilities = normalized(weights) if weights else None  # the recipe has checked: all sets or none
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
