"""Configure all tests: each runs offline, on one thread, from a fixed seed."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

# Rows that tests convert stay out of the user's own cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="peft_crome-tests-")


import tests.torchvision_on_cpu  # noqa: F401  # before anything that imports torchvision

# isort: split

import pytest
import torch

import peft_crome  # noqa: F401  # registers CROME with PEFT
from peft_crome.backbone.compat import has_composite
from tests.zoo_results import pytest_runtest_logreport, pytest_sessionfinish  # noqa: F401  # hooks

# They make composites.
pytest_plugins = ["tests.fixtures"] if has_composite() else []

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Return the device of a test's model. tests/gpu runs the same tests on a GPU."""
    return "cpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


# Warnings are errors (pyproject.toml); these come from inside the libraries, whatever a user does.
THIRD_PARTY_WARNINGS = (
    # peft 0.21.2 reads the old name at every attachment (peft_model.py, PeftModel.__init__).
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # peft 0.21.2 calls the old name in prepare_model_for_kbit_training.
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    # peft looks the base model's configuration up on the Hub to compare vocabularies when it saves.
    "ignore:Could not find a config file in:UserWarning",
)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
