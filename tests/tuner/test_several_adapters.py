"""Test adapters of different branches, sites and sizes on one model: each gives the logits that it gives alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_crome import CromeConfig, CromeLayer
from tests.tuner.helpers import M, assert_equal, attach, crome_weight, file_keys, logits, randomize, unchanged
from tests.zoo.case import Batch, words
from tests.zoo.llava import llava
from tests.zoo.unusual import chameleon

EMBEDDINGS, PROJECTOR = "model.language_model.embed_tokens", "model.multi_modal_projector"
# Name -> what an adapter of it is on LLaVA.
KINDS: dict[str, dict[str, Any]] = {
    "vision": {"branches": ["vision"]},
    "text": {"branches": ["text"]},
    "both": {"branches": ["text", "vision"]},
    "renamed": {"branches": {"image": ["multi_modal_projector"]}},
    "wider": {"branches": ["vision"], "bottleneck_dim": 2 * M},
}


def alone(kind: str, batch: Batch, seed: int = 3) -> torch.Tensor:
    """Return the logits of a model that has this adapter and no other."""
    model = attach(llava().model, kind, **KINDS[kind])
    settle(model, kind, seed)
    return logits(model.eval(), batch)


def settle(model: PeftModel, adapter: str, seed: int) -> None:
    """Set all weights of an adapter to values that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".crome." in name and f".{adapter}." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def together(*kinds: str) -> PeftModel:
    model = attach(llava().model, kinds[0], **KINDS[kinds[0]])
    for kind in kinds[1:]:
        model.add_adapter(kind, CromeConfig(**{"bottleneck_dim": M, **KINDS[kind]}))
    for kind in kinds:
        settle(model, kind, 3)
    return model.eval()


@pytest.mark.parametrize("order", [("vision", "text", "both"), ("both", "vision", "renamed"), ("text", "wider")])
def test_each_is_what_it_is_alone(order: tuple[str, ...], tmp_path: Path) -> None:
    case = llava()
    model = together(*order)
    for kind in (*order, *order[::-1]):
        model.set_adapter(kind)
        assert_equal(logits(model, case.batch), alone(kind, case.batch))
        assert_equal(logits(model, words()), alone(kind, words()))
    model.save_pretrained(tmp_path)
    for kind in order:
        loaded = PeftModel.from_pretrained(llava().model, tmp_path / kind)
        assert_equal(logits(loaded, case.batch), alone(kind, case.batch))
        own = KINDS[kind]["branches"]
        assert sum("gate" in key for key in file_keys(tmp_path / kind)) == len(own)


@pytest.mark.parametrize("names", [["text", "vision"], ["both", "__base__"], ["vision", "both"]], ids="-".join)
def test_rows_of_one_batch(names: list[str]) -> None:
    case = llava()
    model = together("text", "vision", "both")
    with torch.no_grad():
        mixed = model(**case.batch, adapter_names=names).logits
        for row, name in enumerate(names):
            expected = logits(llava().model, case.batch) if name == "__base__" else alone(name, case.batch)
            torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)


def test_several_are_active_at_once() -> None:
    """Several active adapters each act at their own sites, as the branches of one adapter do."""
    model = together("text", "vision")
    model.base_model.set_adapter(["text", "vision"])
    both = attach(llava().model, **KINDS["both"])
    for branch in ("text", "vision"):
        for kind in ("gate", "down"):
            target = crome_weight(both, f"{kind}_{branch}")
            target.data.copy_(crome_weight(model, f"{kind}_{branch}", branch))
    crome_weight(both, "up").data.copy_(crome_weight(model, "up", "text"))
    crome_weight(model, "up", "vision").data.copy_(crome_weight(model, "up", "text"))
    case = llava()
    assert_equal(logits(model, case.batch), logits(both.eval(), case.batch))


def test_deleting_one_leaves_the_other() -> None:
    case = llava()
    model = together("both", "vision")
    model.set_adapter("vision")
    model.delete_adapter("both")
    assert_equal(logits(model, case.batch), alone("vision", case.batch))
    assert_equal(logits(model, words()), logits(llava().model, words()))
    base = model.unload()
    assert not [module for module in base.modules() if isinstance(module, CromeLayer)]
    assert_equal(logits(base, case.batch), logits(llava().model, case.batch))


def test_merging_one_of_several() -> None:
    case = llava()
    model = together("vision", "text")
    with unchanged(model), pytest.raises(ValueError, match="Nothing can be merged"):
        model.merge_adapter(["vision"])
    model.merge_adapter(["text"])
    model.unmerge_adapter()
    model.set_adapter("text")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, case.batch), alone("text", case.batch), rtol=1e-4, atol=1e-5)


def test_one_that_fails_leaves_the_others() -> None:
    case = llava()
    model = together("vision")
    with unchanged(model), pytest.raises(ValueError, match="matches no module"):
        model.add_adapter("second", CromeConfig(branches={"text": ["embed_tokns"]}))
    assert_equal(logits(model, case.batch), alone("vision", case.batch))


def test_image_tokens_of_a_vocabulary() -> None:
    """One table can have an adapter for the rows of image tokens and another for the rows of words."""
    case = chameleon()
    model = attach(case.model, "vision", branches=["vision"])
    model.add_adapter("text", CromeConfig(branches=["text"], bottleneck_dim=M))
    for name in ("vision", "text"):
        randomize(model, name)
    model.eval()
    table = model.get_base_model().get_input_embeddings()
    ids = torch.arange(table.num_embeddings)
    own = set(case.model.model.vocabulary_mapping.image_tokens)
    with torch.no_grad():
        plain = table.base_layer(ids)
        moved = {}
        for name in ("vision", "text"):
            model.set_adapter(name)
            moved[name] = {int(i) for i in ids[(table(ids) != plain).any(-1)]}
        model.base_model.set_adapter(["vision", "text"])
        total = table(ids) - plain
    assert moved["vision"] == own
    assert moved["text"] >= set(ids.tolist()) - own - set(table.placeholders)
    assert total[sorted(own)].any()
