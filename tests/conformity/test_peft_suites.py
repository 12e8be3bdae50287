"""Run PEFT's own tests, from its source distribution, on CROME. The counts are in docs/conformity.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

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


def run_suites(home: Path) -> dict[str, dict[str, Any]]:
    """Run each module of PEFT's tests in PEFT's tree, in its own process, and return the results by module."""
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
def test_no_test_of_peft_fails_that_applies(tmp_path: Path) -> None:
    """No applicable test of PEFT fails. Each pattern that leaves out tests is needed, and the docs have the counts."""
    counts = run_suites(tmp_path)
    wrong = [suite for suite, count in counts.items() if count["failed"] or not count["passed"]]
    assert wrong == [], "\n".join(counts[suite]["said"][-5000:] for suite in wrong)
    patterns = {pattern for patterns in NOT_APPLICABLE.values() for pattern in patterns}
    assert patterns - {pattern for count in counts.values() for pattern in count["patterns"]} == set()
    lines = []
    for suite, count in counts.items():
        cells = [
            f"`{suite}.py`",
            count["passed"],
            *(sum(count[kind].values()) for kind in ("skipped", "not applicable")),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons: Counter[str] = sum((Counter(count["not applicable"]) for count in counts.values()), Counter())
    lines += [f"| {number} | {reason} |" for reason, number in reasons.most_common()]
    text = DOCS.read_text()
    assert [line for line in lines if line not in text] == [], "\n".join(lines)
