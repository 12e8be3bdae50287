"""Load data sets by name or file as `datasets` of rows, converted once and kept on disk, in constant memory."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.utils.sha import sha_fileobj

from ..utils.read_image import read_image
from ..utils.shorten import cut, short
from ..version import __version__
from .files import EXPECTED, stream
from .formats import COLUMNS, parse, row_name
from .image_paths import ImageFolders
from .media import FIELDS, NOUNS, media_of
from .rows import FORM, RowError

logger = logging.getLogger(__name__)

FILE = {"path": Value("string"), "bytes": Value("binary")}
FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(FILE),
        "videos": List({**FILE, "frames": List(FILE)}),  # a file, or its frames
        "audio": List(FILE),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)
ROWS_PER_GROUP = 2000
SUFFIXES = (".json", ".jsonl", ".parquet")
Images = str | Path | Mapping[str, str | Path] | None
Faulty = Literal["stop", "drop"]


def read_rows(
    path: str | Path,
    images: Images = None,
    *,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    name: str | None = None,
    split: str = "train",
    faulty: Faulty = "stop",
) -> Iterator[dict[str, Any]]:
    """Read the rows of a file, or of a data set as `load_rows` takes it, one at a time.

    Args:
        path: a JSON list, JSONL or parquet file. A row is {"id", "image": path or list of paths, "conversations":
            [{"from", "value"}]} (LLaVA), {"images", "messages": [{"role", "content"}]}, or a record that `columns`
            describes. "video" and "audio" work as "image" does. A row without any of them is text alone. Images
            without an `<image>` in the text come before the first question.
        images: folder that paths of images, videos and sounds start from, or a folder for each beginning of a path, as
            in {"coco": "/data/coco"}. None stands for the folder of `path`.
        columns: {"question", "answer", "image", "video", "audio", "id", "options", "rejected"} -> name of a table's
            column.
        prompt: one question for all rows, for a table that has none.
        name: as in `load_rows`.
        split: as in `load_rows`.
        faulty: "stop" raises an error at the first row that cannot be read. "drop" leaves such rows out and logs how
            many they are.
    Yields:
        Rows. `id` is text. `images`, `videos` and `audio` are lists of absolute paths, or of {"bytes", "path"} if the
        file holds them. A video may be {"frames": images}. `messages` is [{"role", "content"}], where content is a
        list of {"type": "image", "video" or "audio"} and {"type": "text", "text"}. An image within a line has
        "text": "". `processor.apply_chat_template` makes the text of the row from it. Some rows also have `answers`
        (texts of several people), `options` (texts of a multiple choice) or `rejected` (the text of the worse answer).
    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file, or a row of it, cannot be read; the message names the row's id and what to write.
    """
    check_columns(columns, prompt)
    local = Path(path)
    table = _is_table(local)
    folders = ImageFolders(images if images is not None else "." if table else local.parent, _home(local))
    dropped = []
    for number, record in enumerate(_records(str(path), name, split) if table else stream(Path(path))):
        row, faults = parse(record, number, folders, columns, prompt)
        if row is not None:
            yield row
            continue
        error = RowError(f"{path}, row {short(row_name(record, number))}", faults)
        if faulty == "stop":
            raise error
        dropped.append(str(error))
    if dropped:
        logger.warning("%s: %d faulty rows were left out. The first: %s", path, len(dropped), dropped[0])


def check_columns(columns: Mapping[str, str] | None, prompt: str | None) -> None:
    """Check that the columns of a table are named.

    Raises:
        ValueError: a column is missing; names it.
    """
    if columns is None:
        if prompt is not None:
            raise ValueError(f"prompt={prompt!r} needs columns: {{image: ..., answer: ...}} beside it.")
        return
    unknown = [key for key in columns if key not in COLUMNS]
    if unknown or "answer" not in columns or ("question" in columns) == (prompt is not None):
        raise ValueError(
            f"columns={dict(columns)}, prompt={prompt!r}: expected the names of `answer` and `question`, or a "
            f"`prompt` instead of `question`. A table may also have {', '.join(COLUMNS[2:])}."
        )


def load_rows(
    path: str | Path,
    images: Images = None,
    *,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    faulty: Faulty = "stop",
) -> Dataset | IterableDataset:
    """Load a data set whose rows have the form of `read_rows`.

    A file is converted when it is first read, and again when it has changed; `datasets` keeps the rows in its cache.

    Args:
        path: a file as in `read_rows`, a folder that `datasets` saved or can load, or a Hub data set.
        images: as in `read_rows`.
        columns: as in `read_rows`.
        prompt: as in `read_rows`.
        faulty: as in `read_rows`.
        name: configuration of a Hub data set.
        split: split of a folder or a Hub data set.
        streaming: read while training, and keep nothing on disk.
    Returns:
        Rows with `id`, `images` and `audio` ({"path", "bytes"} each), `videos` ({"path", "bytes", "frames"} each) and
        `messages`.
    Raises:
        FileNotFoundError, ValueError: as in `read_rows`, or the data set does not exist or has no rows.
    """
    check_columns(columns, prompt)
    local = Path(path)
    settings: dict[str, Any] = {"columns": dict(columns) if columns else None, "prompt": prompt, "faulty": faulty}
    if _is_table(local):
        settings["images"] = _absolute(images if images is not None else ".")
        return _load_table(str(path), name, split, streaming, settings)
    if not local.is_file():
        raise FileNotFoundError(f"{path} is missing; expected {EXPECTED}.")
    if local.suffix.lower() not in (*SUFFIXES, ".csv"):  # `read_rows` refuses CSV with the line that converts it
        raise ValueError(
            f"{path}: expected a file ending in .json, .jsonl or .parquet, a folder, or a name of the Hub."
        )
    settings["images"] = _absolute(images if images is not None else local.parent)
    if next(read_rows(path, **settings), None) is None:  # `datasets` reports this unclearly
        raise ValueError(f"{path} holds no rows that can be read.")
    digest = "" if streaming else file_digest(local)
    arguments = {
        "path": str(local.absolute()),
        "version": f"{__version__} {FORM} {digest}",  # no stale rows are served
        **settings,
    }
    if streaming:
        return IterableDataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments)
    # Each group of rows costs memory while the table is open. Use few, large groups unless they hold images.
    group = None if local.suffix.lower() == ".parquet" else ROWS_PER_GROUP
    try:
        return Dataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments, writer_batch_size=group)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _is_table(path: Path) -> bool:
    """Whether `datasets` opens the path: a folder, even if named like a file (Spark, Dask), or a Hub name."""
    return path.is_dir() or (not path.is_file() and path.suffix.lower() not in SUFFIXES)


def _home(path: Path) -> str | None:
    """Return the folder of a data set that is a folder."""
    return os.path.abspath(path) if path.is_dir() else None


def _absolute(images: str | Path | Mapping[str, str | Path]) -> str | dict[str, str]:
    """Make image folders absolute: `datasets` caches rows by them, also for runs started in another folder."""
    if isinstance(images, Mapping):
        return {begin: os.path.abspath(folder) for begin, folder in images.items()}
    return os.path.abspath(images)


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()  # Python 3.10 has no hashlib.file_digest


def _generate(path: str, version: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    for row in read_rows(path, **arguments):
        yield _stored_row(row)


def _stored_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row to its stored form. References for scores are not stored for training."""
    files = {field: [_stored(medium) for medium in row[field]] for field in FIELDS.values()}
    files["videos"] = [{"path": None, "bytes": None, "frames": [], **video} for video in files["videos"]]
    return {"id": row["id"], **files, "messages": row["messages"]}


def _stored(medium: Any) -> dict[str, Any]:
    if isinstance(medium, str):
        return {"path": medium, "bytes": None}
    if isinstance(medium, dict) and "frames" in medium:
        return {"frames": [_stored(frame) for frame in medium["frames"]]}
    if isinstance(medium, dict):
        return medium
    file = io.BytesIO()
    read_image(medium).save(file, "PNG")
    return {"path": None, "bytes": file.getvalue()}


def _open_table(path: str, name: str | None, split: str, streaming: bool) -> tuple[Any, dict[str, list[str]]]:
    """Open a data set with its files undecoded; also return the names of its classes by column."""
    folder = Path(path)
    saved = folder.is_dir() and any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        table = load_from_disk(path) if saved else load_dataset(path, name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path!r} is not a file, and cannot be loaded as a data set with name={name!r}, split={split!r}: {error}"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{path} has the splits {list(table)}, and no {split!r}. Write split: one of them.")
        table = table[split]
    if saved and streaming:
        table = table.to_iterable_dataset()
    labels = {}
    for column, feature in (table.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            table = table.cast_column(column, undecoded)
        elif isinstance(feature, datasets.ClassLabel):
            labels[column] = feature.names
    return table, labels


def _undecoded(feature: Any) -> Any:
    """Return a column's type with its files undecoded at any depth: a decoded JPEG would be encoded again."""
    for kind in (datasets.Image, datasets.Video, datasets.Audio):
        if isinstance(feature, kind):
            return kind(decode=False)
    if isinstance(feature, dict):
        return {key: _undecoded(inner) for key, inner in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, datasets.LargeList):
        return datasets.LargeList(_undecoded(feature.feature))
    return feature


def _records(path: str, name: str | None, split: str) -> Iterator[dict[str, Any]]:
    table, labels = _open_table(path, name, split, streaming=False)
    for record in table:
        yield _with_names(record, labels)


def _with_names(record: dict[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    known = {column: names[record[column]] for column, names in labels.items() if record[column] is not None}
    return record | known


def _load_table(
    path: str, name: str | None, split: str, streaming: bool, settings: dict[str, Any]
) -> Dataset | IterableDataset:
    table, labels = _open_table(path, name, split, streaming)
    table_arguments = {"source": path, "home": _home(Path(path)), "labels": labels, "version": f"{__version__} {FORM}"}
    rows = table.map(
        _convert,
        batched=True,
        with_indices=True,
        remove_columns=table.column_names,
        features=FEATURES,
        fn_kwargs=table_arguments | settings,
    )
    if not streaming and len(rows) == 0:
        raise ValueError(f"{path} holds no rows that can be read.")
    return rows


def _convert(
    batch: Mapping[str, list[Any]],
    numbers: list[int],
    source: str,
    home: str | None,
    images: str | Mapping[str, str],
    labels: Mapping[str, list[str]],
    version: str,
    columns: Mapping[str, str] | None,
    prompt: str | None,
    faulty: Faulty,
) -> dict[str, list[Any]]:
    folders = ImageFolders(images, home)
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
        record = _with_names(dict(zip(batch, values, strict=True)), labels)
        row, faults = parse(record, number, folders, columns, prompt)
        if row is not None:
            stored = _stored_row(row)
            for key, kept in made.items():
                kept.append(stored[key])
        elif faulty == "stop":
            raise RowError(f"{source}, row {short(row_name(record, number))}", faults)
        else:
            logger.warning("%s, row %s was left out: %s", source, short(row_name(record, number)), faults[0].message)
    return made


def check_files(rows: Iterable[dict[str, Any]]) -> None:
    """Check that the files of all images, videos and sounds exist, before a run begins. None is opened.

    Raises:
        ValueError: a file is missing; names the first such row and the number of missing files.
    """
    missing = [(name, kind, path) for name, kind, path in _files(rows) if not os.path.isfile(path)]
    if missing:
        name, kind, path = missing[0]
        raise ValueError(
            f"Row {short(name)}: the {NOUNS[kind]} {cut(path)} is missing ({len(missing)} such files in all). Name "
            "the folder that holds the images, --images FOLDER, or take the rows out. `peft-crome doctor` lists them."
        )


def files_in(medium: Any) -> Iterator[str]:
    """Yield the paths of files that a medium is read from; none if the row holds their bytes."""
    if isinstance(medium, str):
        yield medium
    elif isinstance(medium, dict) and medium.get("frames"):
        for frame in medium["frames"]:
            yield from files_in(frame)
    elif isinstance(medium, dict) and medium.get("bytes") is None and medium.get("path") is not None:
        yield medium["path"]


def _files(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yield the id of a row, the kind of a medium, and its path."""
    if not isinstance(rows, Dataset):
        for row in rows:
            for kind, media in media_of(row).items():
                yield from ((row["id"], kind, path) for medium in media for path in files_in(medium))
        return
    for batch in rows.select_columns(["id", *FIELDS.values()]).with_format("arrow").iter(batch_size=1000):
        for kind, field in FIELDS.items():  # by column, without reading files inside the table
            media = batch[field].combine_chunks()
            row, files = pc.list_parent_indices(media), pc.list_flatten(media)
            for owner, path in _paths(row, files):
                yield batch["id"][owner].as_py(), kind, path
            if kind == "video":
                frames = pc.struct_field(files, "frames")
                for owner, path in _paths(row.take(pc.list_parent_indices(frames)), pc.list_flatten(frames)):
                    yield batch["id"][owner].as_py(), kind, path


def _paths(row: Any, files: Any) -> Iterator[tuple[int, str]]:
    paths = pc.if_else(pc.is_null(pc.struct_field(files, "bytes")), pc.struct_field(files, "path"), None)
    for owner, path in zip(row.to_pylist(), paths.to_pylist(), strict=True):
        if path is not None:
            yield owner, path
