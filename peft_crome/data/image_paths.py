"""Find files of images, videos and sounds in a folder, or in a folder per beginning of a path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..utils.read_image import local_path
from ..utils.shorten import short
from .rows import Fault, is_unicode

LONGEST = 4096  # characters of a path


class ImageFolders:
    """Turn the paths of rows' images, videos and sounds into paths of files.

    A path is refused by its text, without reading the disk. A link inside a folder may lead anywhere, since its owner
    made it; a row of a data set may not.

    Args:
        folders: one folder, or beginning of a path -> folder: {"coco": "/data/coco", "": "/data/others"}. The longest
            matching beginning counts, and it is not repeated in the folder.
        home: folder of a data set. Absolute paths inside it are accepted as well: `datasets` makes them when it reads
            the images of a folder.
    """

    def __init__(self, folders: str | Path | Mapping[str, str | Path], home: str | Path | None = None) -> None:
        by_beginning = folders if isinstance(folders, Mapping) else {"": folders}
        self.folders = sorted(
            ((begin.strip("/"), os.path.join(os.path.abspath(folder), "")) for begin, folder in by_beginning.items()),
            key=lambda item: -len(item[0]),
        )
        # `datasets` follows links.
        at = [] if home is None else [os.path.abspath(home), os.path.realpath(home)]
        self.homes = tuple(os.path.join(folder, "") for folder in at)

    def find(self, path: str, noun: str = "image") -> str | Fault:
        """Return the absolute path of a row's image, video or sound, or the fault if there is none."""
        path = local_path(path)
        if "://" in path:
            return Fault("path", f"the {noun} {short(path)} is an address. Download it, and name its file.")
        if len(path) > LONGEST:
            return Fault("path", f"the {noun} {short(path)} is neither a path nor a file in base64.")
        if "\0" in path or not is_unicode(path):
            return Fault("path", f"the {noun} path {short(path)} is none: it holds a zero byte or half a character.")
        if self.homes and (full := os.path.normpath(path)).startswith(self.homes):
            return full
        for begin, folder in self.folders:
            if begin == "" or path == begin or path.startswith(f"{begin}/"):
                rest = path[len(begin) :].lstrip("/") if begin else path
                full = os.path.normpath(os.path.join(folder, rest))
                if full.startswith(folder):
                    return full
                return Fault(
                    "path",
                    f"the {noun} path {short(path)} leaves {folder}. Name the folder that holds all {noun}s.",
                )
        known = ", ".join(repr(begin) for begin, _ in self.folders)
        wrong = f"the {noun} path {short(path)} begins with none of {known}. Name a folder for it in `images`."
        return Fault("path", wrong)
