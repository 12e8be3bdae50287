"""Print the tests of files that changed since the last commit, or since a given one. `make check` runs these tests.

    python -m tests.changed [COMMIT]

The tests of a module `a/b/c.py` are `test_c*.py`. If there are none, they are `test_b*.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def changed_files(commit: str = "HEAD") -> list[Path]:
    """Return the Python files that differ from a commit or are new, relative to the repository."""
    commands = (["diff", "--name-only", commit], ["ls-files", "--others", "--exclude-standard"])
    names = [
        name
        for command in commands
        for name in subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    return [path for path in map(Path, names) if path.suffix == ".py" and (ROOT / path).is_file()]


def tests_of(file: Path) -> list[Path]:
    """Return the test files for one changed file."""
    if file.parts[0] == "tests":
        return [file] if file.name.startswith("test_") else []
    tests = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    for name in (file.stem, file.parent.name):
        if found := [path for path in tests if path.stem.startswith(f"test_{name}")]:
            return found
    return []


if __name__ == "__main__":
    print(*dict.fromkeys(str(test) for file in changed_files(*sys.argv[1:2]) for test in tests_of(file)))
