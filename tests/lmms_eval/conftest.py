"""A stage's directory is made as in the tests of training."""

from tests.training.conftest import dataset, values  # noqa: F401  # fixtures
from tests.vlm.conftest import backbones  # noqa: F401
