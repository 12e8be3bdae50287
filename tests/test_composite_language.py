"""Test that an adapter leaves the composite's language model unchanged for text, with a Q-Former and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_crome.tuner.sites.find import default_bottleneck_dim
from tests.test_mixed_batch import COMPOSITES
from tests.tuner.helpers import assert_equal, attach, kernels, logits, randomize
from tests.vlm.tiny import make_batch


def batch_of(kind: str, images: tuple[int, ...]) -> dict[str, Any]:
    batch = make_batch(COMPOSITES[kind](), images_per_row=images)
    if kind == "t5":
        batch["labels"] = torch.tensor([[9, 10, 1], [11, 12, 1], [13, 14, 1]])
    if kind == "qformer" and sum(images):
        batch["qformer_input_ids"] = torch.tensor([[5, 6, 7]] * sum(images))
        batch["qformer_attention_mask"] = torch.ones_like(batch["qformer_input_ids"])
    return batch


def both(kind: str) -> tuple[Any, PeftModel]:
    """Return the base model and another one with the default adapter, which is not an identity."""
    model = attach(COMPOSITES[kind](), branches=None, bottleneck_dim=None)
    randomize(model)
    return COMPOSITES[kind]().requires_grad_(False).eval(), model.eval()


@pytest.mark.parametrize("kind", COMPOSITES)
def test_branches_and_size_by_default(kind: str) -> None:
    _, model = both(kind)
    branches = ["text", "vision"] if kind == "qformer" else ["vision"]
    config = model.peft_config["default"]
    assert (config.branches, config.bottleneck_dim) == (branches, default_bottleneck_dim(len(branches)))


@pytest.mark.parametrize("kind", COMPOSITES)
def test_words_alone_and_beside_images(kind: str) -> None:
    base, model = both(kind)
    words, mixed = batch_of(kind, (0, 0, 0)), batch_of(kind, (1, 0, 2))
    assert_equal(logits(model, words), logits(base, words))
    assert_equal(logits(model, mixed)[1], logits(base, mixed)[1])
    assert not torch.allclose(logits(model, mixed)[0], logits(base, mixed)[0], atol=1e-3)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_words_are_generated_and_tokens_cost_nothing(kind: str) -> None:
    base, model = both(kind)

    def answer(model: Any, images: tuple[int, ...], length: int) -> Any:
        batch = {key: value for key, value in batch_of(kind, images).items() if key != "labels"}
        return model.generate(**batch, max_new_tokens=length, min_new_tokens=length, do_sample=False)

    assert torch.equal(answer(model, (0, 0, 0), 6), answer(base, (0, 0, 0), 6))
    for images in ((0, 0, 0), (1, 0, 2)):
        counts = []
        for one in (base, model):
            short, long = (kernels(lambda one=one, n=n, images=images: answer(one, images, n)) for n in (3, 6))
            long.subtract(short)
            counts.append(+long)
        assert counts[0] == counts[1]
