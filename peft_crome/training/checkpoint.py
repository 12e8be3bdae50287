"""A stage's directory: written complete or not at all, checked when it is read, a whole Hub repository in itself."""

from __future__ import annotations

import hashlib
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

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME

from ..vlm.checkpoint import STAGE_RECORD
from ..written import check_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD = STAGE_RECORD  # written last: a directory without it is not complete
RECIPE = "recipe.json"  # in the folder of a run's checkpoints: what they belong to
LOCK = "lock"  # beside it: held by the process that writes there
COMPLETE = "complete.json"  # of a checkpoint, written last: its files and their sizes
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

# Keys that may change on request: rows that stopped a run are mended or left out, and it goes on.
OF_DATA = ("data.", "content of data.", "training.max_length")

logger = logging.getLogger(__name__)


class StageError(ValueError):
    """A directory is no stage's, is half-written, or does not fit what is to start from it."""


def save_stage(model: PeftModel, processor: Any, directory: str | Path, record: dict[str, Any], card: str) -> None:
    """Write the composite with what was trained, the adapter, the processor, the card and the record.

    The adapter is taken off the model: `model.unload()` puts the trained modules in their places.

    Args:
        model: the trained PEFT model around a composite.
        processor: the composite's.
        directory: must not exist, or be empty; appears under its name when everything is in it.
        record: what the stage was; JSON values. The list of the stages is its key "stages".
        card: README.md.
    Raises:
        StageError: the directory holds something.
        ValueError: other weights were written than were meant; no directory is there then.
    """
    directory = Path(directory)
    check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    name = model.active_adapter
    adapter = {key: value for key, value in get_peft_model_state_dict(model).items() if ".crome_" in key}
    own = [key for key, _ in model.named_parameters() if ".crome_" in key and f".{name}." in key]
    config = model.peft_config[name]
    composite = model.unload()
    target = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(target, ignore_errors=True)  # of a run that was interrupted here
    target.mkdir()
    try:
        composite.config.has_adapter = True
        try:
            composite.save_pretrained(target)
        finally:
            composite.config.has_adapter = False
        processor.save_pretrained(target)
        adapter = {key: value.detach().contiguous() for key, value in adapter.items()}
        save_file(adapter, target / SAFETENSORS_WEIGHTS_NAME)
        check_files(target, [key.replace(f".{name}.", ".") for key in own], SAFETENSORS_WEIGHTS_NAME)
        values = config.to_dict() | {
            "modules_to_save": None,  # the composite beside it holds them
            "base_model_name_or_path": None,
            "inference_mode": True,
            "trained_on": (config.trained_on or {}) | {"name_or_path": composite.config.text_model_name_or_path},
        }
        text = json.dumps(_plain(values), indent=2, sort_keys=True)
        (target / ADAPTER_CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
        (target / "README.md").write_text(card, encoding="utf-8")
        text = json.dumps({**record, "files": _sizes(target), "config": _config_digest(target)}, indent=2)
        (target / RECORD).write_text(f"{text}\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    if directory.exists():
        directory.rmdir()
    os.replace(target, directory)


def check_free(directory: str | Path) -> None:
    """Refuse to write over something.

    Raises:
        StageError: the directory holds files, is a file, or cannot be made.
    """
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise StageError(f"{directory} is there already and is not overwritten. Name another output, or move it away.")
    parent = next(folder for folder in directory.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StageError(f"{directory} cannot be written: {parent} is no folder that you may write to.")


def is_finished(directory: Path, checkpoints: Path, recipe: dict[str, Any]) -> bool:
    """Whether a run of this recipe wrote its directory and was interrupted before it removed its checkpoints."""
    if not (directory / RECORD).is_file() or not checkpoints.is_dir():
        return False
    return read_record(directory)["stages"][-1]["recipe"] == recipe


def read_record(directory: str | Path) -> dict[str, Any]:
    """Read what a stage's directory says of itself, and see that all its files are there in full.

    Raises:
        StageError: it is no stage's directory, or a file is missing or of another size.
    """
    directory = Path(directory)
    path = directory / RECORD
    if not path.is_file():
        found = sorted(file.name for file in directory.iterdir())[:8] if directory.is_dir() else "no such directory"
        raise StageError(
            f"{directory} is no complete stage's directory: it has no {RECORD} ({found}). Point `previous` at a "
            "directory that `peft-crome train` has finished, or run that stage again."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, _ = record["files"], record["stages"][-1]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise StageError(f"{path} cannot be read ({error!r}). Copy the directory again.") from error
    sizes = _sizes(directory)
    faulty = [
        f"{name} ({'missing' if name not in sizes else 'of another size'})"
        for name, size in files.items()
        if name != "README.md" and sizes.get(name) != size and (name != CONFIG_NAME or name not in sizes)
    ]
    if CONFIG_NAME in sizes and "config" in record and record["config"] != _config_digest(directory):
        faulty.append(f"{CONFIG_NAME} (of other content, beside where the backbones are)")
    if faulty:
        raise StageError(f"{directory} is incomplete: {', '.join(faulty)}. Copy the directory again.")
    return record


def _config_digest(directory: Path) -> str | None:
    """Of what config.json says, without the names of places, which may move; None: it cannot be read."""

    def without_places(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: without_places(item) for key, item in value.items() if not key.endswith("name_or_path")}

    try:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(without_places(config), sort_keys=True).encode()).hexdigest()


@contextmanager
def only_run(checkpoints: Path, is_main: bool = True) -> Iterator[None]:
    """Keep the folder of a run's checkpoints to one run at a time; the system frees it when the process ends.

    Args:
        checkpoints: the folder; made where it is missing.
        is_main: whether this process writes; others do nothing.
    Raises:
        StageError: another run writes there, or nobody knows whose folder it is.
    """
    _check_own(checkpoints)
    if not is_main or fcntl is None:
        yield
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    with open(checkpoints / LOCK, "a+", encoding="utf-8") as file:
        try:
            # Not flock: the workers that read data would inherit it, and outlive a killed run by some seconds.
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


def _check_own(checkpoints: Path) -> None:
    """Refuse a folder that holds something and was not begun by `open_run`: what is there may be another program's."""
    names = {path.name for path in checkpoints.iterdir()} if checkpoints.is_dir() else set()
    others = sorted(names - {LOCK, Path(RECIPE).with_suffix(".tmp").name})
    if others and RECIPE not in names:
        raise StageError(
            f"{checkpoints} holds {others[:4]} and no {RECIPE}, so it is no folder of this package's checkpoints, and "
            "nothing in it is touched. Move it away, or name another output."
        )


def open_run(
    checkpoints: Path, run: dict[str, Any], is_main: bool = True, accept_changed_data: bool = False
) -> str | None:
    """Find the checkpoint that a run goes on from, or begin its folder.

    Args:
        checkpoints: the folder.
        run: the recipe, and what tells the data; JSON values.
        is_main: whether this process writes.
        accept_changed_data: go on although `OF_DATA` differ.
    Returns:
        The last checkpoint that was written in full; None: there is none. Others are removed.
    Raises:
        StageError: the folder's checkpoints belong to another run.
    """
    path = checkpoints / RECIPE
    found = {
        int(p.name.split("-")[-1]): p for p in checkpoints.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()
    }
    whole = [step for step, folder in found.items() if _is_whole(folder)]
    for folder in (folder for step, folder in found.items() if step not in whole and is_main):
        logger.warning("%s was not written in full; it is removed.", folder)
        shutil.rmtree(folder, ignore_errors=True)
    if whole:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StageError(
                f"{path} cannot be read ({error}), so nobody knows what its checkpoints belong to. Remove that folder "
                "to begin anew."
            ) from error
        different = sorted(d for d in _differences(before, run) if not d.startswith(WITHOUT_EFFECT))
        acceptable = all(d.startswith(OF_DATA) for d in different)
        if different and not (accept_changed_data and acceptable):
            ways = "Remove that folder to begin anew, or put it back as it was to go on."
            if acceptable:
                ways = (
                    "Put it back as it was to go on; or, where this mends rows that stopped the run, go on with "
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
    return str(found[max(whole)]) if whole else None


def complete_checkpoint(checkpoint: Path) -> None:
    """Say that all files of a checkpoint are written."""
    _replace(checkpoint / COMPLETE, _sizes(checkpoint))


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return files.items() <= _sizes(checkpoint).items()


def _sizes(directory: Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _replace(path: Path, value: Any) -> None:
    """Write JSON beside its place and move it there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
    temporary.replace(path)


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
