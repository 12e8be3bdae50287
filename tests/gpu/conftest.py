"""What tests on a GPU share: where they run, and that warnings of kernels are no errors."""

from __future__ import annotations

import pytest


@pytest.fixture
def device() -> str:
    """Of the tests that run on a CPU elsewhere."""
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Of the tests of this folder: on a CPU as well, so that a fault of the test is found without a GPU."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))  # each GPU's libraries have warnings of their own
