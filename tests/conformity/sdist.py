"""Fetch PEFT's source distribution, which contains its tests. It is downloaded once from the package index and checked
by its hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
from filelock import FileLock

# release -> sha256 of its archive
KNOWN = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}


class NotThere(Exception):
    """PEFT's source distribution is not available."""


def unpack(cache: Path, target: Path) -> Path:
    """Unpack the installed release's source distribution in `target`, and return the path of its source tree.

    Raises:
        NotThere: the tests of this release have not been reviewed for CROME, or the package index cannot be reached.
        ValueError: the archive does not have the known hash.
    """
    if peft.__version__ not in KNOWN:
        raise NotThere(f"PEFT {peft.__version__} is installed; its tests were gone through for {sorted(KNOWN)}")
    name = f"peft-{peft.__version__}"
    archive = cache / "wheels" / f"{name}.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(archive.with_name(f".{archive.name}.lock")):
        if not archive.is_file():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=peft", "--dest"]
            arguments = [str(archive.parent), f"peft=={peft.__version__}", "--disable-pip-version-check"]
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise NotThere(f"pip could not download it: {done.stderr.strip().splitlines()[-1:]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != KNOWN[peft.__version__]:
        archive.unlink()
        raise ValueError(f"{archive.name} has sha256 {found}, expected {KNOWN[peft.__version__]}. It was removed.")
    with tarfile.open(archive) as file:
        # The argument `filter` came with Python 3.11.4; Debian 12 has 3.11.2.
        file.extraction_filter = getattr(tarfile, "data_filter", None)
        file.extractall(target)
    (target / name / "tests" / "__init__.py").touch()  # its modules import one another as a package
    return target / name
