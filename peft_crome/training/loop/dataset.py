"""A recipe's data sets -> what the Trainer draws rows from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from ...data import check_files, load_rows, mix, mixture_probabilities, split_turns
from ...data.mixture import normalized
from ...data.sources import FEATURES, file_digest
from ..recipe.schema import Data, Recipe


def load_sources(recipe: Recipe) -> list[Any]:
    """Each data set of a recipe, in its order; every image file is there.

    Raises:
        FileNotFoundError, ValueError: as `load_rows` and `check_files`.
    """
    sources = [load_rows(**said.model_dump(exclude={"weight"})) for said in recipe.data]
    for source in sources:
        if isinstance(source, Dataset):
            check_files(source)
    return sources


def content_of(said: Data, source: Any) -> str | None:
    """What tells whether a data set is still the one that a run began with.

    Returns:
        A digest of a file's bytes, or of a table; None: nobody can tell, as of a stream from the Hub.
    """
    if isinstance(source, Dataset):
        return source._fingerprint
    if Path(said.path).is_file():
        return file_digest(Path(said.path))
    files = sorted(path for path in Path(said.path).rglob("*") if path.is_file())  # none, of a name of the Hub
    return "".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns} " for path in files) or None


def training_rows(recipe: Recipe, sources: list[Any], split: bool) -> Any:
    """The mixture that a recipe describes.

    Args:
        sources: of `load_sources`.
        split: whether each answer becomes a row (see `ConversationCollator`).
    """
    weights = [said.weight for said in recipe.data if said.weight is not None]
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
