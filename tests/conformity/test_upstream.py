"""Test docs/upstream: the offer to PEFT passes its tests in PEFT's tree, and the reported faults still exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest

from examples.easy_vqa.parts import cache_dir
from tests.conformity.sdist import NotThere, unpack
from tests.stand_ins import save_smolvlm
from tests.test_docs import ROOT, UPSTREAM, python_blocks

RELEASE = re.compile(r"^Release: (?P<name>\S+) (?P<release>\S+)$", re.M)
REPORTS = sorted(path.relative_to(ROOT).as_posix() for path in (UPSTREAM / "reports").iterdir())
# Beside the method's own tests, a few lines of PEFT's test matrix. README.md there has the counts of all of them.
MATRIX = "CROME and (save_load_roundtrip or disable_adapters or merge_and_unmerge)"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("apply_offer", UPSTREAM / "apply.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return PEFT's source tree with the offer applied."""
    try:
        source = unpack(cache_dir(), tmp_path_factory.mktemp("offer"))
    except NotThere as reason:
        pytest.skip(str(reason))
    assert script().apply(source) == ["docs/source/_toctree.yml"]  # which a source distribution does not have
    return source


def run(*command: str, source: Path) -> str:
    environment = os.environ | {"PYTHONPATH": "src", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", *command]
    done = subprocess.run(
        arguments, cwd=source, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_offer_passes_its_tests_in_the_tree_of_peft(checkout: Path) -> None:
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-q", "--tb=short", "-W", "ignore::FutureWarning"]
    tests = ["tests/test_crome.py", "tests/test_custom_models.py"]
    output = run("pytest", *options, *tests, "-k", f"TestCrome or ({MATRIX})", source=checkout)
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed[1]) > 40, output[-500:]


def test_the_offer_keeps_to_the_style_of_peft(checkout: Path) -> None:
    edited = [name for name in script().EDITS if name.endswith(".py") and (checkout / name).is_file()]
    new = [path.relative_to(UPSTREAM / "peft").as_posix() for path in (UPSTREAM / "peft").rglob("*.py")]
    assert len(new) == 6
    settings = checkout / "pyproject.toml"
    # PEFT pins a minor release of ruff.
    settings.write_text(re.sub(r"^required-version.*$", "", settings.read_text(), flags=re.M))
    run("ruff", "check", "--no-cache", *new, source=checkout)
    run("ruff", "format", "--no-cache", "--check", *new, *edited, source=checkout)


def test_a_tree_with_other_lines_is_left_as_it_is(tmp_path: Path) -> None:
    types = tmp_path / "src" / "peft" / "utils" / "peft_types.py"
    types.parent.mkdir(parents=True)
    types.write_text("class PeftType: ...\n")
    with pytest.raises(ValueError, match=r"peft_types\.py has .*DEFT.* 0 times, expected once"):
        script().apply(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [types]
    assert types.read_text() == "class PeftType: ...\n"


@pytest.mark.filterwarnings("ignore")  # of the libraries that are reported
@pytest.mark.parametrize("report", REPORTS)
def test_a_reported_fault_is_still_there(report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = RELEASE.search((ROOT / report).read_text(encoding="utf-8"))
    assert found is not None
    try:
        installed = version(found["name"]).partition("+")[0]  # PyTorch names its build after the plus sign
    except PackageNotFoundError:
        installed = "not installed"
    if installed != found["release"]:
        pytest.skip(f"the report is of {found['name']} {found['release']}; here it is {installed}")
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(report)
    if "SmolVLM" in block.code:
        save_smolvlm(tmp_path / "HuggingFaceTB" / "SmolVLM-256M-Instruct")
    exec(block.compile(), {"__name__": "__main__"})
