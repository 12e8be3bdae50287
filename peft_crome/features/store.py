"""Keep tensors in files by key, written whole or not at all, by any number of processes, up to a size."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..utils.atomic import replaced

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
STALE = 3600.0  # seconds after which an unrenamed file counts as left by a killed process


class FeatureStore:
    """A folder of tensors.

    Nothing is ever removed to make room. Training reads its rows in turn, so a removed row would be needed again just
    when its replacement has been removed. Features that do not fit are computed each time.

    Args:
        directory: created if it is missing. Several processes, of several machines, may share it.
        max_bytes: limit of all files; processes that write at once may exceed it by about a second of writing.
    Raises:
        ValueError: the directory is a file, or max_bytes is not positive.
    """

    def __init__(self, directory: str | os.PathLike, max_bytes: int) -> None:
        self.directory = Path(directory)
        if self.directory.is_file():
            raise ValueError(f"{self.directory} is a file. Name a folder for the features.")
        if max_bytes <= 0:
            raise ValueError(f"The limit of {max_bytes} bytes leaves no room. Write max_gigabytes=50.")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self._size = self._measure()
        self._written = 0
        self._warned_full = self._warned_of_failure = False

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a key, on the CPU; None if there are none, or their file is damaged."""
        path = self._path(key)
        try:
            return load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:  # a failed disk: the next `put` replaces the file
            logger.warning("%s cannot be read (%s) and is computed again.", path, error)
            return None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> bool:
        """Store tensors under a key; return False if they do not fit, or the disk cannot be written."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._size + size > self.max_bytes or self._written > self.max_bytes // 50:
            self._size, self._written = self._measure(), 0  # other processes write as well
        if self._size + size > self.max_bytes:
            if not self._warned_full:
                logger.warning(
                    "%s is full (%.2f GB): features of further images are computed each time.",
                    self.directory, self.max_bytes / 1e9,
                )  # fmt: skip
            self._warned_full = True
            return False
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            # A file must not store shared memory twice, and a slice would keep its whole batch.
            whole = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
            with replaced(path) as temporary:
                temporary.write_bytes(whole)  # files of `save_file` are readable only by their owner
        except OSError as error:  # a full disk, or a folder that may only be read
            if not self._warned_of_failure:
                message = "%s cannot be written to (%s): features that are not there are computed each time."
                logger.warning(message, self.directory, error)
            self._warned_of_failure = True
            return False
        self._size += size
        self._written += size
        return True

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}{SUFFIX}"

    def _measure(self) -> int:
        """Sum the bytes of all files, and remove files of killed processes."""
        total = 0
        for folder, _, names in os.walk(self.directory):
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.stat()
                    if name.endswith(".tmp") and time.time() - status.st_mtime > STALE:
                        path.unlink()
                    else:
                        total += status.st_size
                except OSError:
                    continue  # just renamed by another process, or a read-only folder
        return total
