"""Test what the package promises to its users: its public names, the cost of its import, and its dependencies."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_crome

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own there

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

PUBLIC_NAMES = [
    "AdapterPool",
    "CromeConfig",
    "CromeLayer",
    "CromeModel",
    "CromeVLMConfig",
    "CromeVLMForConditionalGeneration",
    "CromeVLMProcessor",
    "FeatureCache",
    "SiteReport",
    "__version__",
    "cache_features",
    "check",
    "describe_adapter",
    "hotswap_adapter",
    "logits_at_labels",
    "pack_rows",
]


def test_public_names_are_these() -> None:
    assert peft_crome.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", [name for name in PUBLIC_NAMES if name != "__version__"])
def test_public_names_exist_and_have_docstrings(name: str) -> None:
    public = getattr(peft_crome, name)
    assert public.__module__.startswith("peft_crome."), name
    assert public.__doc__, f"{name} has no docstring of its own"


def test_public_names_are_in_the_reference() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").iterdir()]
    documented = re.findall(r"^::: peft_crome\.(\w+)$", "\n".join(pages), re.M)
    assert sorted(documented) == sorted(set(PUBLIC_NAMES) - {"__version__"})
    assert "`peft_crome.__version__`" in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["training", "data", "evaluation", "serving", "inspection"])
def test_names_of_the_parts_are_in_the_reference(package: str) -> None:
    module = importlib.import_module(f"peft_crome.{package}")
    page = (ROOT / "docs" / "reference" / f"{package}.md").read_text(encoding="utf-8")
    documented = re.findall(rf"^::: peft_crome\.{package}\.(\w+)$|`peft_crome\.{package}\.(\w+)`", page, re.M)
    assert sorted("".join(pair) for pair in documented) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert isinstance(getattr(module, name), dict) or getattr(module, name).__doc__, name


def test_import_loads_nothing_beside_transformers_and_peft() -> None:
    # The cost in seconds is measured by benchmarks/import_time.py; what would make it grow is a package more.
    code = (
        "import sys, peft; before = set(sys.modules); import peft_crome; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=300
    )
    loaded = set(re.findall(r"'(\w+)'", result.stdout))
    assert loaded - {"transformers", "packaging"} == {"peft_crome"}  # peft has loaded a part of packaging


@pytest.mark.parametrize(
    ("package", "module"), [("training", "pydantic"), ("training", "datasets"), ("data", "ijson")]
)
def test_missing_extra_is_named(package: str, module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import peft_crome.{package}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    expected = f"needs '{module}', which is not installed. Write: pip install \"peft-crome[train]\""
    assert last.startswith("ImportError: peft_crome.")
    assert last.endswith(expected)


def test_package_is_typed() -> None:
    assert (Path(peft_crome.__file__).parent / "py.typed").is_file()


def test_pre_commit_pins_the_same_linters() -> None:
    pinned = {item for item in PYPROJECT["dependency-groups"]["dev"] if isinstance(item, str) and "==" in item}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r'"([\w-]+==[\d.]+)"', hooks)) == pinned


def test_the_method_is_read_in_one_sitting() -> None:
    """Five files of `peft_crome/tuner/` hold the whole method in less than 500 lines."""
    files = [
        ROOT / "peft_crome" / "tuner" / f"{name}.py" for name in ("bottleneck", "config", "weights", "layer", "model")
    ]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 500
