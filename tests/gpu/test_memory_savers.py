"""Run the CPU's tests of offloading and gradient checkpointing on a GPU."""

import pytest

from tests.conformity.test_accelerate import test_offloaded_backbone_gives_the_same_logits_and_gradients  # noqa: F401
from tests.tuner.test_training import test_gradient_checkpointing_gives_equal_gradients  # noqa: F401

pytestmark = pytest.mark.gpu
