"""Fixtures for tests on a GPU: the device of a test. Warnings of GPU libraries are not errors in this folder."""

from __future__ import annotations

import pytest


@pytest.fixture
def device() -> str:
    """Return the GPU, for tests of other folders that also run on a CPU."""
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Return each device on which the tests of this folder run. The CPU is one of them, so that a fault of a test
    shows without a GPU."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))  # each GPU's libraries have warnings of their own
