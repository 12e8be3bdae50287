"""Run the tests of `tests/tuner/test_quantized.py` on a GPU, with bitsandbytes' own CUDA kernels for nf4 and int8."""

import pytest

from tests.tuner.test_quantized import (  # noqa: F401
    checkpoint,
    test_fresh_adapter_leaves_logits_bit_equal,
    test_gradients_reach_every_adapter_parameter,
    test_merge_folds_the_text_branch_of_a_quantized_backbone,
    test_prepare_for_kbit_training_makes_no_difference_to_what_trains,
    test_scale_of_a_packed_embedding_table,
    test_training_changes_the_adapter_alone_and_reloads_equal,
    test_unload_gives_the_quantized_backbone_back,
)

pytestmark = pytest.mark.gpu
