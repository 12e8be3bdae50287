"""Check a data set before a run: every row, every image, video and sound, and the lengths of rows."""

from __future__ import annotations

import gc
import json
import marshal
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from ..utils.atomic import new_file
from ..utils.shorten import cut
from .fields import ignored_fields, is_a_list_of_media, media_fields
from .files import stream
from .formats import kept_turns, parse, row_name, turns_key
from .image_paths import ImageFolders
from .images import open_image
from .media import FIELDS, NOUNS, media_of
from .row_text import RowSize
from .rows import Fault, RowError
from .sounds import read_sound, sound_header
from .sources import Images, check_columns, files_in
from .turns import ROLES, own_media, role_of
from .videos import first_frame, frames_of, read_video, video_header

CHUNK = 256
EXACT = {"images in a row", "videos in a row", "sounds in a row", "turns in a row", "samples a second of sounds"}
Numbers = dict[str, int]  # name of a histogram -> the value that a medium adds


@dataclass(frozen=True)
class Patient:
    """A faulty row.

    Args:
        number: number of the row in the file, from 0.
        name: id of the row.
        faults: all faults of the row.
    """

    number: int
    name: str
    faults: tuple[Fault, ...]


@dataclass
class Findings:
    """Results of `examine` for a file.

    Args:
        rows: number of rows in the file.
        text_rows: number of readable rows without media.
        ignored: field that is not read -> number of readable rows that have it.
        histograms: name -> value -> count. The names are "images in a row", "turns in a row", "longer side of images"
            (pixels) and "characters in a row". With videos or sounds there are "frames in a video", "seconds of
            videos", "seconds of sounds" and "samples a second of sounds", and with a model "tokens in a row". Values
            of names that are not in `EXACT` are rounded up to powers of two.
    """

    rows: int = 0
    text_rows: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    patients: list[Patient] = field(default_factory=list)
    histograms: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def count(self, name: str, value: int) -> None:
        """Add one to a histogram."""
        self.histograms[name][value if name in EXACT else 1 << max(0, value - 1).bit_length()] += 1

    def by_kind(self) -> dict[str, list[tuple[str, Fault]]]:
        """Group the ids and faults of rows by kind of fault."""
        kinds: dict[str, list[tuple[str, Fault]]] = {}
        for patient in self.patients:
            for fault in patient.faults:
                kinds.setdefault(fault.kind, []).append((patient.name, fault))
        return kinds


def examine(
    path: str | Path,
    images: Images = None,
    *,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    open_images: bool = True,
    measure: Callable[[list[dict[str, Any]]], list[RowSize | ValueError]] | None = None,
    on_fault: Callable[[Patient], None] | None = None,
    on_row: Callable[[int], None] | None = None,
) -> Findings:
    """Check every row of a file, and change nothing. Folders and Hub data sets are not read.

    Args:
        path: a file as `read_rows` takes it.
        images: as in `read_rows`.
        columns: as in `read_rows`.
        prompt: as in `read_rows`.
        open_images: decode every image and sound and the first frame of every video. False only checks that the files
            exist.
        measure: `ConversationCollator.measure`, to measure rows in tokens.
        on_fault: called with each faulty row as it is found.
        on_row: called with the number of rows read so far.
    Raises:
        FileNotFoundError, ValueError: the file does not exist, or is neither JSON nor parquet.
        ImportError: a package that reads videos or sound is missing.
    """
    path = Path(path)
    check_columns(columns, prompt)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; expected a file, JSON or parquet, as the doctor looks through files alone. "
            f"Give it the files of the folder one by one: peft-crome doctor {path / 'FILE.parquet'}"
        )
    folders = ImageFolders(images if images is not None else path.parent)
    findings = Findings()
    seen: set[bytes] = set()
    seen_files: dict[tuple[str, str], Fault | Numbers] = {}
    look = _look if open_images else _find
    numbered = enumerate(stream(path))
    with _with_rare_collections(), ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(numbered, CHUNK)):
            parsed = [(number, record, *parse(record, number, folders, columns, prompt)) for number, record in chunk]
            files = {medium for *_, row, _ in parsed if row for medium in _media(row) if isinstance(medium[1], str)}
            new = sorted(files - seen_files.keys())
            seen_files.update(zip(new, pool.map(look, new) if open_images else map(look, new), strict=True))
            readable = []
            for _, record, row, faults in parsed:
                if row is not None:
                    findings.ignored.update(ignored_fields(record, columns))
                    wrong = list(_of_media(row, seen_files, look, findings))
                    faults += [*wrong, *_twice(row, seen)]
                    _count_text(row, findings)
                    if not any(fault.kind in ("missing", "unreadable") for fault in wrong):
                        readable.append((row, faults))
            if measure is not None:
                for size, (_, faults) in zip(measure([row for row, _ in readable]), readable, strict=True):
                    faults += _of_size(size, findings)
            for number, record, _, faults in parsed:
                if faults:
                    patient = Patient(number, row_name(record, number), tuple(faults))
                    findings.patients.append(patient)
                    if on_fault is not None:
                        on_fault(patient)
            findings.rows += len(chunk)
            if on_row is not None:
                on_row(findings.rows)
    return findings


@contextmanager
def _with_rare_collections() -> Iterator[None]:
    """Keep the garbage collector from scanning existing objects (PyTorch) and rows, which have no cycles."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100 * CHUNK, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _media(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each medium of a row with its kind."""
    return ((kind, medium) for kind, media in media_of(row).items() for medium in media)


def _find(medium: tuple[str, Any]) -> Fault | Numbers:
    kind, source = medium
    gone = next((path for path in files_in(source) if not os.path.isfile(path)), None)
    return Fault("missing", f"the {NOUNS[kind]} {cut(gone)} is missing.") if gone is not None else {}


def _look(medium: tuple[str, Any]) -> Fault | Numbers:
    """Return the values that a decodable file adds to histograms, or its fault."""
    kind, source = medium
    missing = _find(medium)
    if isinstance(missing, Fault):
        return missing
    try:
        if kind == "image":
            return {"longer side of images": max(open_image(source, "").size)}
        if kind == "audio":
            samples, rate = sound_header(source, "")
            read_sound(source, "", rate)
            return {"seconds of sounds": math.ceil(samples / rate), "samples a second of sounds": rate}
        read_video(source, "", first_frame)
        header = video_header(source, "")
        numbers = {"frames in a video": header.total_num_frames}
        return numbers if frames_of(source) else numbers | {"seconds of videos": math.ceil(header.duration or 0)}
    except ValueError as error:
        return Fault("unreadable", str(error).removeprefix(": "))


def _of_media(
    row: dict[str, Any],
    seen: dict[tuple[str, str], Fault | Numbers],
    look: Callable[[tuple[str, Any]], Fault | Numbers],
    findings: Findings,
) -> Iterator[Fault]:
    media = media_of(row)
    findings.text_rows += not media
    for kind, of_kind in FIELDS.items():
        if kind in media or kind == "image":
            findings.count(f"{NOUNS[kind]}s in a row", len(row.get(of_kind) or []))
    for medium in _media(row):
        result = seen[medium] if isinstance(medium[1], str) else look(medium)
        if isinstance(result, Fault):
            yield result
        else:
            for name, value in result.items():
                findings.count(name, value)


def _twice(row: dict[str, Any], seen: set[bytes]) -> Iterator[Fault]:
    shown = [medium if isinstance(medium, str | dict) else str(medium) for _, medium in _media(row)]
    content = [row["messages"], shown]
    # Version 0 gives equal bytes for equal values, seven times as fast as JSON.
    digest = blake2b(marshal.dumps(content, 0), digest_size=8).digest()
    if digest in seen:
        yield Fault("duplicate", "the same conversation about the same images stands in an earlier row.")
    seen.add(digest)


def _count_text(row: dict[str, Any], findings: Findings) -> None:
    findings.count("turns in a row", len(row["messages"]))
    texts = [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]
    findings.count("characters in a row", sum(map(len, texts)))


def _of_size(size: RowSize | ValueError, findings: Findings) -> list[Fault]:
    if isinstance(size, RowError):
        return size.faults
    if isinstance(size, ValueError):  # a header that was not read before
        return [Fault("unreadable", str(size))]
    findings.count("tokens in a row", size.length)
    cut = size.length - size.kept
    return [Fault("cut", f"{size.length} tokens, of which the last {cut} are cut off.")] if cut > 0 else []


def check_copy(path: Path, output: Path) -> None:
    """Check that a copy can be written, before the original is read.

    Raises:
        FileExistsError: the file exists; nothing is ever overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: the file is parquet, or the copy's name does not end in .json or .jsonl.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already, and no file is overwritten. Name another file.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output}: there is no folder {output.absolute().parent}.")
    if path.suffix.lower() == ".parquet" or output.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} -> {output}: only JSON and JSONL are written, to a file ending in .json or .jsonl.")


def write_fixed(
    path: str | Path,
    output: str | Path,
    findings: Findings,
    images: Images = None,
) -> tuple[int, int]:
    """Write a copy without the faulty rows. Rows that can be corrected are corrected, and all others stay as they are.

    NaN and infinity become null, since JSON cannot write them.

    Args:
        path: the examined file, JSON or JSONL. Faulty rows with their answer in `completion` or `chosen` are
            left out and not corrected.
        output: the copy, a JSON list, or JSONL if it ends in .jsonl. It must not exist.
        findings: the result of `examine`.
        images: as in `examine`.
    Returns:
        The number of rows written, and the number of them that were corrected.
    Raises:
        FileExistsError, ValueError: as `check_copy`.
    """
    path, output = Path(path), Path(output)
    check_copy(path, output)
    folders = ImageFolders(images if images is not None else path.parent)
    patients = {patient.number: patient for patient in findings.patients}
    lines = output.suffix == ".jsonl"
    written = fixed = 0
    with new_file(output) as file:
        for number, row in enumerate(stream(path)):
            patient = patients.get(number)
            if patient is not None:
                if not all(fault.fixed for fault in patient.faults):
                    continue
                if turns_key(row) == "prompt" or row.get("chosen") is not None:
                    continue
                row = _fix(row, number, folders)
                fixed += 1
            file.write("" if lines else "[\n" if written == 0 else ",\n")
            file.write(_as_json(row))
            file.write("\n" if lines else "")
            written += 1
        file.write("" if lines else "\n]\n" if written else "[]\n")
    return written, fixed


def _as_json(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=float, allow_nan=False)
    except ValueError:  # NaN, or a number too large for a float
        return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(float(value)) else None
    return value


def _fix(row: dict[str, Any], number: int, folders: ImageFolders) -> dict[str, Any]:
    """Leave out the turns that are not read, with the media that they show. Other fields are unchanged."""
    parsed, _ = parse(row, number, folders)
    key = turns_key(row)
    assert parsed is not None and key is not None  # noqa: PT018  # only rows whose faults are all fixed get here
    kept = [row[key][turn] for turn in kept_turns([ROLES[role_of(turn)] for turn in row[key]])]
    fixed = {**row, key: kept}
    for kind, of_kind in FIELDS.items():
        shown = len(parsed[of_kind]) - sum(own_media(turn, kind) for turn in kept)
        for name in media_fields(row).get(kind, []):
            if is_a_list_of_media(row[name], kind):
                fixed[name] = row[name][:shown]
            elif shown == 0:
                fixed.pop(name)
    return fixed
