"""Test continuous batching in transformers for prompts without images, with an attached and with a folded adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from peft_crome.serving import fold
from tests.tuner.helpers import attach, randomize
from tests.vlm.tiny import build

PROMPTS = [[1, 5, 6, 7], [1, 8, 9]]
TOKENS = 6


def tokens(model: Any) -> list[list[int]]:
    """Return the tokens that `generate` gives for one prompt after another."""
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)[0, -TOKENS:].tolist()
        for prompt in prompts
    ]


@pytest.mark.skipif(not hasattr(tf, "ContinuousBatchingConfig"), reason="this transformers has another interface")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_generate_batch(tmp_path: Path) -> None:
    adapted = attach(build())
    randomize(adapted)
    expected = tokens(adapted.eval())
    fold(adapted, tmp_path / "folded")
    folded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    generation = tf.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = tf.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    for model in (folded, adapted):
        batch = model.generate_batch(
            inputs=PROMPTS, generation_config=generation, continuous_batching_config=memory, progress_bar=False
        )
        assert [batch[key].generated_tokens for key in sorted(batch)] == expected
