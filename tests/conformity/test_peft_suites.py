"""PEFT's own tests, from its source distribution, on CROME; docs/conformity.md has the counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.easy_vqa.parts import cache_dir
from tests.conformity.hosts import write_hosts
from tests.conformity.not_applicable import NOT_APPLICABLE
from tests.conformity.sdist import NotThere, unpack

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "conformity.md"
# module -> the classes of it that are about any method
SUITES = {
    "test_decoder_models": "",
    "test_encoder_decoder_models": "",
    "test_custom_models": "",
    "test_initialization": "TestHotSwapping or TestCustomModelConfigWarning or TestNoInfiniteRecursionDeepspeed",
    "test_tuners_utils": "TestModelAndLayerStatus",
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Module -> what came of it."""
    home = tmp_path_factory.mktemp("conformity")
    try:
        source = unpack(cache_dir(), home)
    except NotThere as reason:
        pytest.skip(str(reason))
    write_hosts(home / "hosts")
    found = {}
    for suite, classes in SUITES.items():
        environment = os.environ | {
            "HF_HOME": str(home / "hosts"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
            "CROME_CONFORMITY_COUNTS": str(home / f"{suite}.json"),
        }
        options = ["-p", "crome_suites", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "--tb=short"]
        command = [sys.executable, "-m", "pytest", *options, f"tests/{suite}.py", "-k", classes]
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert (home / f"{suite}.json").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
        found[suite] = json.loads((home / f"{suite}.json").read_text()) | {"said": done.stdout}
    return found


@pytest.mark.slow
def test_no_test_of_peft_fails_that_applies(counts: dict[str, dict]) -> None:
    for suite, count in counts.items():
        assert count["failed"] == [], f"{suite}: {count['said'][-5000:]}"
        assert count["passed"] > 0, suite


@pytest.mark.slow
def test_each_reason_is_needed(counts: dict[str, dict]) -> None:
    """A pattern that no longer matches a test would be a claim about nothing."""
    patterns = {pattern for patterns in NOT_APPLICABLE.values() for pattern in patterns}
    assert patterns - {pattern for count in counts.values() for pattern in count["patterns"]} == set()


@pytest.mark.slow
def test_docs_have_the_counts(counts: dict[str, dict]) -> None:
    text = DOCS.read_text()
    for suite, count in counts.items():
        out = [sum(count[kind].values()) for kind in ("skipped", "not applicable")]
        line = f"| `{suite}.py` | {count['passed']} | {out[0]} | {out[1]} |"
        assert line in text, f"docs/conformity.md lacks: {line}"
    total: dict[str, int] = {}
    for count in counts.values():
        for reason, number in count["not applicable"].items():
            total[reason] = total.get(reason, 0) + number
    for reason, number in total.items():
        assert f"| {number} | {reason} |" in text, f"docs/conformity.md lacks: | {number} | {reason} |"
