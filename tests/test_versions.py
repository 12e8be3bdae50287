"""Test that every place names the same range of releases, and that other releases cause an error or a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peft_crome.backbone import compat
from tests.matrix import ROWS
from tests.test_public_api import PYPROJECT

ROOT = Path(__file__).parent.parent
DEPENDENCIES = {
    requirement.name: requirement for requirement in map(Requirement, PYPROJECT["project"]["dependencies"])
}


def install(monkeypatch: pytest.MonkeyPatch, **releases: str) -> None:
    """Pretend that these releases are installed."""
    real = compat.version
    monkeypatch.setattr(compat, "version", lambda name: releases.get(name) or real(name))


@pytest.mark.parametrize("name", compat.SUPPORTED)
def test_ranges_are_those_of_pyproject(name: str) -> None:
    assert SpecifierSet(compat.SUPPORTED[name]) == DEPENDENCIES[name].specifier
    newest = {Requirement(words).name: words.partition("==")[2] for words in ROWS["newest"]["packages"]}
    assert newest[name].startswith(compat.NEWEST_TESTED[name] + ".")


def test_oldest_row_is_the_lower_bounds() -> None:
    bounds = [
        f"{name}=={bound.version}"
        for name, requirement in DEPENDENCIES.items()
        for bound in requirement.specifier
        if bound.operator == ">="
    ]
    assert ROWS["oldest"]["packages"] == bounds


@pytest.mark.parametrize(
    ("name", "release", "message"),
    [
        ("transformers", "4.56.2", "peft_crome needs transformers>=4.57.6,"),
        ("transformers", "5.3.0", "peft_crome needs transformers>=4.57.6,!=5.0.*,"),
        ("transformers", "6.0.0", "peft_crome needs transformers>=4.57.6,"),
        ("peft", "0.19.1", "peft_crome needs peft>=0.20,<1"),
    ],
)
def test_other_releases_are_refused(name: str, release: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **{name: release})
    with pytest.raises(ImportError) as caught:
        compat.check_installed()
    text = str(caught.value)
    assert text.startswith(message)
    assert f", and {name} {release} is installed. Write: pip install " in text
    assert text.endswith(f'"{name}{compat.SUPPORTED[name]}"')


@pytest.mark.parametrize("release", ["5.25.0", "5.24.1", "5.12.0", "4.57.6"])
def test_only_a_newer_minor_release_warns(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, transformers=release, peft="0.21.2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.check_installed()
    assert [str(warning.message)[:42] for warning in caught] == (
        ["transformers 5.25.0 is newer than 5.24, th"] if release == "5.25.0" else []
    )


def test_composite_says_what_it_needs() -> None:
    code = """
import importlib.metadata, sys
import tests.torchvision_on_cpu
real = importlib.metadata.version
importlib.metadata.version = lambda name: "5.11.0" if name == "transformers" else real(name)
import peft_crome
assert peft_crome.CromeConfig and "peft_crome.vlm" not in sys.modules
try:
    from peft_crome import CromeVLMConfig
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == (
        "CromeVLMForConditionalGeneration needs transformers>=5.12,<6, and transformers 5.11.0 is installed. "
        'Write: pip install "transformers>=5.12,<6"'
    )


def test_releases_are_compared_in_one_place() -> None:
    compares = re.compile(
        r"(__version__|\bversion\(|\bVersion\(|_ge_|sys\.version_info).*[<>]|SpecifierSet|is_\w+_greater"
    )
    found = {
        path.relative_to(ROOT / "peft_crome").as_posix()
        for path in (ROOT / "peft_crome").rglob("*.py")
        if any(map(compares.search, path.read_text(encoding="utf-8").splitlines()))
    }
    assert found == {"backbone/compat.py"}
