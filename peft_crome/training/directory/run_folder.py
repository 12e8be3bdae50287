"""Manage the folder of a run's checkpoints: one process writes to it, and an interrupted run continues from it."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...utils.atomic import is_unfinished, replaced
from ..errors import StageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"  # in the folder of a run's checkpoints: the run that they belong to


LOCK = "lock"  # beside it: held by the process that writes the checkpoints


COMPLETE = "complete.json"  # in a checkpoint, written last: its files and their sizes


# Keys of a recipe that may change between interruption and restart: the weights do not depend on them.
WITHOUT_EFFECT = (
    "feature_cache",
    "evaluation",
    "training.logging_steps",
    "training.save_steps",
    "training.arguments.dataloader_num_workers",
    "training.arguments.disable_tqdm",
    "training.arguments.report_to",
)


# Keys that may change on request: rows that stopped a run are corrected or left out, and the run continues.
OF_DATA = ("data.", "content of data.", "training.max_length")


@contextmanager
def only_run(checkpoints: Path, is_main: bool = True) -> Iterator[None]:
    """Keep the folder of a run's checkpoints to one run at a time. The system frees it when the process ends.

    Args:
        checkpoints: the folder; created if it is missing.
        is_main: whether this process writes; others do nothing.
    Raises:
        StageError: another run writes to the folder, or the folder's owner is unknown.
    """
    _check_is_run_folder(checkpoints)
    if not is_main or fcntl is None:
        yield
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    with open(checkpoints / LOCK, "a+", encoding="utf-8") as file:
        try:
            # Not flock: data loader workers would inherit it and outlive a killed run by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise StageError(
                f"{checkpoints} is being written by another run ({file.read() or 'which has just begun'}). Wait until "
                "it ends or stop it; or name another output."
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s); see that no other run writes there.", checkpoints, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
        yield


def _check_is_run_folder(checkpoints: Path) -> None:
    """Refuse a non-empty folder that `open_run` did not begin, since its files may be another program's."""
    names = {path.name for path in checkpoints.iterdir()} if checkpoints.is_dir() else set()
    # A run may have been killed while it wrote its recipe, by this release or by an earlier one.
    others = sorted(names - {LOCK, "recipe.tmp"} - {name for name in names if is_unfinished(name, RECIPE)})
    if others and RECIPE not in names:
        raise StageError(
            f"{checkpoints} holds {others[:4]} and no {RECIPE}, so it is not a folder of peft_crome's "
            "checkpoints, and nothing in it was changed. Move it away, or name another output."
        )


def open_run(
    checkpoints: Path, run: dict[str, Any], is_main: bool = True, accept_changed_data: bool = False
) -> str | None:
    """Find the checkpoint that a run continues from, or begin its folder.

    Args:
        checkpoints: the folder.
        run: the recipe, and values that identify the data; JSON values.
        is_main: whether this process writes.
        accept_changed_data: continue although `OF_DATA` differ.
    Returns:
        The last complete checkpoint; None: there is none. Incomplete ones are removed.
    Raises:
        StageError: the folder's checkpoints belong to another run.
    """
    path = checkpoints / RECIPE
    folders = checkpoints_of(checkpoints)
    whole = [step for step, folder in folders.items() if _is_whole(folder)]
    for folder in (folder for step, folder in folders.items() if step not in whole and is_main):
        logger.warning("%s was not written in full; it is removed.", folder)
        shutil.rmtree(folder, ignore_errors=True)
    if whole:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StageError(
                f"{path} cannot be read ({error}), so it is unknown which run its checkpoints belong to. Remove "
                "that folder to begin anew."
            ) from error
        different = sorted(d for d in _differences(before, run) if not d.startswith(WITHOUT_EFFECT))
        acceptable = all(d.startswith(OF_DATA) for d in different)
        if different and not (accept_changed_data and acceptable):
            ways = "Remove that folder to begin anew, or put it back as it was to go on."
            if acceptable:
                ways = (
                    "Put it back as it was to go on. If you corrected rows that stopped the run, go on with "
                    "peft-crome train ... --accept-changed-data, in Python train(..., accept_changed_data=True). Or "
                    "remove that folder to begin anew."
                )
            raise StageError(f"{checkpoints} holds checkpoints of another run: {'; '.join(different)}. {ways}")
        if different:
            logger.warning(
                "The run goes on with changed data (%s), whose rows may come in another order from here.",
                "; ".join(different),
            )
            if is_main:
                _replace(path, run)
    elif is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _replace(path, run)
    return str(folders[max(whole)]) if whole else None


def checkpoints_of(directory: Path) -> dict[int, Path]:
    """Find the checkpoints in a folder by their step, complete or not."""
    folders = {path.name.removeprefix("checkpoint-"): path for path in directory.glob("checkpoint-*")}
    return {int(step): path for step, path in folders.items() if step.isdigit()}


def complete_checkpoint(checkpoint: Path) -> None:
    """Mark a checkpoint as complete after all of its files are written."""
    _replace(checkpoint / COMPLETE, file_sizes(checkpoint))


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return files.items() <= file_sizes(checkpoint).items()


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        return [d for name in names for d in _differences(before.get(name), now.get(name), f"{key}.{name}".strip("."))]
    if isinstance(before, list) and isinstance(now, list):
        pairs = enumerate(zip_longest(before, now))
        return [d for number, (a, b) in pairs for d in _differences(a, b, f"{key}.{number}")]
    return [] if before == now else [f"{key} was {before!r}, is {now!r}"]


def clear(directory: Path) -> None:
    """Remove the checkpoints of a finished stage."""
    if directory.is_dir():
        shutil.rmtree(directory)


def file_sizes(directory: Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _replace(path: Path, value: Any) -> None:
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
