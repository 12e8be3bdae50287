"""Test that each way of installing brings all that it needs. Other installed packages are hidden."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
INSTALLED = {
    # the requirements of an installation -> what must run with nothing else
    "the package alone": (
        PROJECT["dependencies"],
        "import peft_crome, peft_crome.evaluation, peft_crome.serving",
    ),
    "with train": (
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"],
        "import peft_crome.cli.app, peft_crome.training, peft_crome.data, peft_crome.evaluation",
    ),
    "with plots": (
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["plots"],
        "import peft_crome.inspection",
    ),
    "make quickstart": (
        PROJECT["dependencies"] + PYPROJECT["dependency-groups"]["quickstart"],
        "import examples.easy_vqa.__main__, examples.easy_vqa.quickstart, examples.easy_vqa.report",
    ),
}
# In a process of its own: setuptools puts what it has bundled on the path of one that imports it.
HIDE = """
import importlib.machinery, sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name

HIDDEN = {
    package
    for package, distributions in packages_distributions().items()
    if not {canonicalize_name(name) for name in distributions} & THERE and not package.startswith("_")
}
assert "pytest" in HIDDEN  # else nothing is looked at

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""


def closure(requirements: list[str]) -> set[str]:
    """Return the distributions that pip would install for these requirements, by canonical name."""
    found: set[tuple[str, str]] = set()
    wanted = [Requirement(line) for line in requirements]
    while wanted:
        one = wanted.pop()
        for extra in {"", *one.extras}:
            if (one.marker and not one.marker.evaluate({"extra": ""})) or (one.name, extra) in found:
                continue
            found.add((one.name, extra))
            try:
                lines = requires(one.name) or []
            except PackageNotFoundError:
                continue  # of another platform
            needed = [Requirement(line) for line in lines]
            for part in needed:
                if part.marker is None or part.marker.evaluate({"extra": extra}):
                    part.marker = None
                    wanted.append(part)
    return {canonicalize_name(name) for name, _ in found}


@pytest.mark.parametrize("installed", INSTALLED)
def test_what_is_installed_is_enough(installed: str) -> None:
    requirements, code = INSTALLED[installed]
    there = closure(requirements) | {"peft-crome", "torch"}
    done = subprocess.run(
        [sys.executable, "-c", f"THERE = {there}{HIDE}{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
