"""Check which images, videos and sounds a model takes, by its processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..utils.shorten import cut, short
from .media import FIELDS, NOUNS, media_of
from .processed import UnknownPlaceholder
from .rows import RowError, row_error


def kinds_taken(processor: Any) -> set[str]:
    """Return the kinds of media that a processor takes.

    Args:
        processor: the model's processor; or the class of the composite's, which takes only images.
    """
    if isinstance(processor, type):
        return {"image"}
    parts = {kind: getattr(processor, f"{kind}_processor", None) for kind in ("image", "video")}
    parts["audio"] = sound_processor(processor)
    return {kind for kind, part in parts.items() if part is not None}


def sound_processor(processor: Any) -> Any:
    """Return the part of a processor that takes sound; None: it has none."""
    parts = (getattr(processor, name, None) for name in ("audio_processor", "feature_extractor"))
    return next((part for part in parts if hasattr(part, "sampling_rate")), None)


def check_rows(rows: Iterable[Mapping[str, Any]], processor: Any) -> None:
    """Check that a model takes the media of all rows, before any of them is opened.

    Args:
        processor: as in `kinds_taken`.
    Raises:
        RowError: as in `check_row`.
    """
    for name, kinds in _kinds_of_rows(rows):
        _check(name, kinds, processor)


def shows_more_than_images(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some rows have videos or sounds."""
    return any(kinds - {"image"} for _, kinds in _kinds_of_rows(rows))


def check_row(row: Mapping[str, Any], processor: Any) -> None:
    """Check that a model takes the media of a row.

    Raises:
        RowError: the model takes no such media, or no images with videos in one conversation; names the row.
    """
    _check(row["id"], media_of(row).keys(), processor)


def _check(row: str, kinds: Set[str], processor: Any) -> None:
    name = getattr(processor, "__name__", type(processor).__name__)
    for kind in sorted(kinds - kinds_taken(processor)):
        wrong = f"{name} takes no {NOUNS[kind]}. Take the row out, or name a model that takes one."
        raise row_error(row, "host", wrong)
    if {"image", "video"} <= kinds and _shares_names(processor):
        wrong = f"{name} takes images or videos in a conversation, and the row has both. Take one kind out."
        raise row_error(row, "host", wrong)


def _kinds_of_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Set[str]]]:
    """Yield the first row with each set of kinds."""
    seen: set[frozenset[str]] = set()
    for row, kinds in _all_kinds(rows):
        if kinds not in seen:
            seen.add(kinds)
            yield row, kinds


def _all_kinds(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the kinds of each row; for a table only the first row with each set per thousand, by column."""
    if not isinstance(rows, Dataset):
        yield from ((row["id"], frozenset(media_of(row))) for row in rows)
        return
    for batch in rows.select_columns(["id", *FIELDS.values()]).with_format("arrow").iter(batch_size=1000):
        shown = np.stack([np.asarray(pc.list_value_length(batch[field])) > 0 for field in FIELDS.values()], 1)
        distinct, first = np.unique(shown, axis=0, return_index=True)
        for kinds, number in zip(distinct, first.tolist(), strict=True):
            yield batch["id"][number].as_py(), frozenset(kind for kind, has in zip(FIELDS, kinds, strict=True) if has)


def check_batch(rows: Sequence[Mapping[str, Any]], processor: Any) -> None:
    """Check that a batch can hold the media of all its rows.

    Raises:
        ValueError: some rows have images and some have videos, and the processor gives both the same names.
    """
    with_images, with_videos = ([row for row in rows if kind in media_of(row)] for kind in ("image", "video"))
    if with_images and with_videos and _shares_names(processor):
        names = f"{short(with_images[0]['id'])} and {short(with_videos[0]['id'])}"
        raise ValueError(
            f"Rows {names}: {type(processor).__name__} takes images or videos in a batch, and one row has images, the "
            "other videos. Write training.rows_per_device: 1."
        )


@contextmanager
def naming_batch(rows: Sequence[Mapping[str, Any]], processor: Any, remedy: str) -> Iterator[None]:
    """Name the rows in the error of a processor that cannot batch them: some reject videos of different lengths.

    Args:
        remedy: a sentence on how to take one row at a time.
    """
    try:
        yield
    except (RowError, UnknownPlaceholder):
        raise
    except ValueError as error:
        if len(rows) == 1 or not shows_more_than_images(rows):
            raise
        names, cause = ", ".join(short(row["id"]) for row in rows), " ".join(str(error).split())
        raise ValueError(
            f"Rows {names}: {type(processor).__name__} makes no batch of their videos or sounds ({cut(cause, 200)}). "
            f"{remedy}, or let the processor choose as many frames of each video."
        ) from error


def _shares_names(processor: Any) -> bool:
    """Whether a processor gives images and videos the same names, as SmolVLM does, so that no batch can have both."""
    parts = (getattr(processor, f"{kind}_processor", None) for kind in ("image", "video"))
    names = [set(getattr(part, "model_input_names", ())) for part in parts]
    return bool(names[0] & names[1])
