"""Correct the cards of adapters in uploads to the Hub, by any way of uploading."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME

from .card import PAGE, correct_card


def correct_folder(
    repo_id: str, folder_path: str | os.PathLike, path_in_repo: str | None = None, **patterns: Any
) -> None:
    """Correct the cards of CROME adapters in a folder that is about to be uploaded, as `correct_card` does.

    Args:
        repo_id, folder_path, path_in_repo: as in `HfApi.upload_folder`.
        patterns: its `allow_patterns` and `ignore_patterns`. Files that they exclude are not changed.
    """
    folder = Path(folder_path).expanduser()
    files = {path.relative_to(folder).as_posix() for name in (CONFIG_NAME, PAGE) for path in folder.glob(f"**/{name}")}
    for inside in {PurePosixPath(path).parent for path in filter_repo_objects(files, **patterns)}:
        correct_card(folder / inside, repo_id, _subfolder(PurePosixPath((path_in_repo or "").strip("/")) / inside))


def correct_upload(repo_id: str, operations: Iterable[Any]) -> list[Any]:
    """Correct the cards of CROME adapters in a commit's operations, as `correct_card` does.

    A card that does not come from the adapter's folder is corrected only in the commit.

    Args:
        repo_id: repository of the commit.
        operations: operations of `HfApi.create_commit`.
    """
    operations = list(operations)
    places = {_place(each): number for number, each in enumerate(operations) if isinstance(each, CommitOperationAdd)}
    for place in dict.fromkeys(place.parent for place in places if place.name in (CONFIG_NAME, PAGE)):
        config, page = (
            operations[places[place / name]] if place / name in places else None for name in (CONFIG_NAME, PAGE)
        )
        with TemporaryDirectory() as temporary:
            folder = _folder(config, CONFIG_NAME) or (_folder(page, PAGE) if config is None else None)
            if folder is None:
                folder = Path(temporary)
                _write(config, folder / CONFIG_NAME)
            path = folder / PAGE
            if page is not None and _folder(page, PAGE) != folder:
                path = Path(temporary) / PAGE
                _write(page, path)
            if not correct_card(folder, repo_id, _subfolder(place), path):
                continue
            for file in (path, *folder.glob("example_image.*")):
                content = file.read_bytes() if file.is_relative_to(temporary) else str(file)
                operation = CommitOperationAdd(path_in_repo=str(place / file.name), path_or_fileobj=content)
                if place / file.name in places:
                    operations[places[place / file.name]] = operation
                else:
                    operations.append(operation)
    return operations


def _folder(operation: CommitOperationAdd | None, name: str) -> Path | None:
    """Return the folder that a file comes from under the same name; None: it is bytes, or another file."""
    source = operation.path_or_fileobj if operation is not None else None
    return Path(source).parent if isinstance(source, (str, Path)) and Path(source).name == name else None


def _write(operation: CommitOperationAdd | None, path: Path) -> None:
    if operation is not None:
        with operation.as_file() as file:
            path.write_bytes(file.read())


def _place(operation: CommitOperationAdd) -> PurePosixPath:
    return PurePosixPath(operation.path_in_repo.replace(os.sep, "/"))


def _subfolder(place: PurePosixPath) -> str | None:
    return str(place) if place.parts else None
