"""Test batches in which each row has its own adapter. A row gives the same logits as in a batch where every row has
that adapter."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from peft_crome import CromeConfig
from tests.tuner.helpers import M, adapted, assert_equal, logits, randomize
from tests.zoo import ZOO, Case
from tests.zoo.test_zoo import applies, each_architecture


def two_adapters(case: Case) -> PeftModel:
    model = adapted(case, "first")
    model.add_adapter("second", CromeConfig(branches=[*case.sites], bottleneck_dim=M))
    randomize(model, "second", seed=7)
    return model.eval()


@each_architecture
def test_rows_are_those_of_single_batches(name: str) -> None:
    case = ZOO[name]()
    applies(case, "mixed batch")
    model = two_adapters(case)
    single = {}
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        single[adapter] = logits(model, case.batch)
    with model.disable_adapter():
        single["__base__"] = logits(model, case.batch)
    with torch.no_grad():
        for names in (["first", "second"], ["second", "__base__"], ["first", "first"]):
            mixed = model(**case.batch, adapter_names=names).logits
            for row, adapter in enumerate(names):
                torch.testing.assert_close(mixed[row], single[adapter][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(single["first"][0], single["second"][0], rtol=1e-3, atol=1e-4)
    assert_equal(logits(model, case.batch), single["second"])  # nothing is left behind


@pytest.mark.parametrize("name", [name for name in ZOO if name in ("gemma3n", "ovis2")])
def test_what_cannot_be_told_apart_is_refused(name: str) -> None:
    """Different adapters per row are refused where one embedding serves every row, such as a sound's padding or an
    image's frame."""
    case = ZOO[name]()
    assert case.not_applicable["mixed batch"]
    with pytest.raises(ValueError, match=r"rows for 2 adapter_names.* model\.set_adapter\(name\)"):
        two_adapters(case)(**case.batch, adapter_names=["first", "second"])
