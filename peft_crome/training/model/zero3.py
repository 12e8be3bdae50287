"""Keep DeepSpeed ZeRO-3 out of the loading of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def without_zero3() -> Iterator[None]:
    """Have transformers build whole models while the block runs; DeepSpeed partitions the trainer's model later.

    With ZeRO-3, transformers would partition each weight when its model is built, which needs all processes. But a
    composite reads the weights of its parts, a skeleton has none, and the first process alone writes a stage.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
