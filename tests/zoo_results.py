"""Collect the results of the zoo's tests, from which `tests/zoo/table.py` writes the table of `docs/models.md`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parent.parent / "build" / "zoo.json"
TEST = re.compile(r"tests/zoo/test_(?:zoo|quantized|language)\.py::test_(\w+)\[(.+)\]")

found: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome of a test on an architecture, with the test's properties."""
    match = TEST.fullmatch(report.nodeid)
    if match is None or (report.when != "call" and report.passed):
        return
    check, name = match.groups()
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped and report.longrepr else ""  # type: ignore[index]
    result = found.setdefault(name, {"checks": {}, "properties": {}})
    result["checks"][check] = {"outcome": report.outcome, "reason": reason}
    result["properties"] |= dict(report.user_properties)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results in the main process only, not in the workers of pytest-xdist."""
    if hasattr(session.config, "workerinput") or not found:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, result in found.items():
        old = known.setdefault(name, {"checks": {}, "properties": {}})
        old["checks"] |= result["checks"]
        old["properties"] |= result["properties"]
    temporary = RESULTS.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
    os.replace(temporary, RESULTS)
