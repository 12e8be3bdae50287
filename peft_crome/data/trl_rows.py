"""Convert rows for TRL's trainers."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import generate_random_fingerprint

from ..utils.shorten import short
from .sources import FEATURES


def to_trl(rows: Iterable[dict[str, Any]]) -> Dataset | IterableDataset:
    """Turn rows into a data set that TRL's trainers take. An image is opened when its row is read.

    The last answer of a row is its completion. The turns before it are the prompt, with earlier answers.
    `to_trl(split_turns(rows))` makes a row of each answer instead.

    Args:
        rows: rows of `read_rows`, which are kept in a temporary folder until the process ends. Or rows of `load_rows`,
            whose table keeps them on disk or streams them.
    Returns:
        A data set with the columns `id`, `images`, `prompt`, `completion` and `answers`. `images` holds none or more,
        read as transformers reads a file: RGB, turned by the EXIF orientation. `prompt` and `completion` are messages.
        `answers` are texts for a reward: those of several people, or the completion's. Rows with a rejected answer
        have `chosen` and `rejected` instead of `completion`.
    Raises:
        ValueError: there are no rows, one has a video or a sound, some have a rejected answer and some have none, or
            as `read_rows`.
    """
    rows = rows if isinstance(rows, Dataset | IterableDataset) else iter(rows)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("There are no rows. Pass rows of read_rows or load_rows; an iterator can be read only once.")
    features = _features(*(("completion",) if first.get("rejected") is None else ("chosen", "rejected")))
    if isinstance(rows, Dataset):
        return rows.map(_row, fn_kwargs={"features": features}, remove_columns=rows.column_names, features=features)
    if isinstance(rows, IterableDataset):  # its `map` does not decode images
        return IterableDataset.from_generator(
            _rows, features=features, gen_kwargs={"rows": rows, "features": features}
        )
    folder = tempfile.mkdtemp(prefix="peft_crome-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Dataset.from_generator(
            lambda: _rows(chain([first], rows), features),
            features=features,
            cache_dir=folder,
            fingerprint=generate_random_fingerprint(),  # rows that are read only once have no hash
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _features(*answer_fields: str) -> Features:
    messages = dict.fromkeys(("prompt", *answer_fields), FEATURES["messages"])
    images = List(Image(mode="RGB"))
    return Features({"id": Value("string"), "images": images, **messages, "answers": List(Value("string"))})


def _rows(rows: Iterable[dict[str, Any]], features: Features) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield _row(row, features)


def _row(row: dict[str, Any], features: Features) -> dict[str, Any]:
    if row.get("videos") or row.get("audio"):
        raise ValueError(
            f"Row {short(row['id'])} has a video or a sound, and TRL's trainers take images alone. Take the row out, "
            "or train with peft-crome finetune."
        )
    *prompt, answer = row["messages"]
    answers = row.get("answers") or ["".join(part["text"] for part in answer["content"])]
    made = {"id": row["id"], "images": row["images"], "prompt": prompt, "answers": answers}
    rejected = row.get("rejected")
    if (rejected is None) == ("rejected" in features):
        wrong = f"Row {short(row['id'])} has {'no' if rejected is None else 'a'} rejected answer, unlike the first row"
        raise ValueError(f"{wrong}. Take the rows of one kind out.")
    if rejected is None:
        return {**made, "completion": [answer]}
    other = {"role": "assistant", "content": [{"type": "text", "text": rejected}]}
    return {**made, "chosen": [answer], "rejected": [other]}
