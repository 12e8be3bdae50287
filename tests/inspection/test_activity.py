"""Test the inspection of an adapter on a batch against the equation and against the model itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from peft_crome import CromeConfig
from peft_crome.inspection import inspect_activity
from tests.tuner.helpers import BOTH, M, adapted, assert_equal, attach, crome_weight, logits, randomize
from tests.vlm.tiny import build, make_batch
from tests.zoo import ZOO
from tests.zoo.case import IMAGE_TOKEN


def reference(model: torch.nn.Module, x: torch.Tensor, branch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gates and the change of the embeddings, computed directly from the equation."""
    gate, down, up = (crome_weight(model, name) for name in (f"gate_{branch}", f"down_{branch}", "up"))
    gates = F.silu(x @ gate.T)
    return gates, (gates * (x @ down.T)) @ up.T


def test_numbers_are_those_of_the_equation_and_placeholders_are_left_out() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    text, vision = inspect_activity(model, case.batch)
    if text.branch != "text":
        text, vision = vision, text
    host = model.get_base_model()
    ids = case.batch["input_ids"].flatten()
    places = (ids != IMAGE_TOKEN).nonzero().flatten()
    assert_equal(text.positions, places)
    assert_equal(text.token_ids, ids[places])
    with torch.no_grad():
        table = host.model.language_model.embed_tokens.get_base_layer()
        read = {"text": table(ids[places])}
        tower = host.model.vision_tower(case.batch["pixel_values"]).last_hidden_state[:, 1:]
        read["vision"] = host.model.multi_modal_projector.get_base_layer()(tower).flatten(0, 1)
        for found in (text, vision):
            x = read[found.branch]
            gates, change = reference(model, x, found.branch)
            torch.testing.assert_close(found.gate, gates.abs().mean(-1))
            torch.testing.assert_close(found.embedding_norm, x.norm(dim=-1))
            torch.testing.assert_close(found.change_norm, change.norm(dim=-1))
            torch.testing.assert_close(found.relative_change, change.norm(dim=-1) / x.norm(dim=-1))
        layer = host.model.language_model.embed_tokens
        moved = layer(ids[places][None]) - table(ids[places][None])
        torch.testing.assert_close(text.change_norm, moved[0].norm(dim=-1), atol=1e-5, rtol=1e-4)
    assert vision.token_ids is None
    assert len(vision.gate) == 2 * 4


def test_model_is_as_it_was() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    before = logits(model, case.batch)
    model.train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    inspect_activity(model, case.batch)
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert_equal(logits(model.eval(), case.batch), before)


def test_unit_that_adds_nothing_is_silent() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    with torch.no_grad():
        crome_weight(model, "down_vision")[2] = 0
    found = {row.branch: row for row in inspect_activity(model, case.batch)}
    assert found["vision"].silent_units == (2,)
    assert found["text"].silent_units == ()


def test_fresh_adapter_changes_nothing_and_every_unit_is_silent() -> None:
    case = ZOO["llava"]()
    for row in inspect_activity(attach(case.model), case.batch):
        assert not row.change_norm.any()
        assert row.silent_units == tuple(range(M))
        assert row.gate.all()


def test_text_alone_reaches_one_branch() -> None:
    case = ZOO["llava"]()
    (row,) = inspect_activity(adapted(case), case.text_only)
    assert row.branch == "text"
    assert_equal(row.token_ids, case.text_only["input_ids"][0])


def test_padding_is_left_out() -> None:
    case = ZOO["llava"]()
    batch = {key: value.clone() for key, value in case.batch.items() if key != "labels"}
    batch["attention_mask"][0, 0] = 0
    rows = {row.branch: row for row in inspect_activity(adapted(case), batch)}
    assert 0 not in rows["text"].positions
    assert rows["text"].positions[0] == 5  # behind the padding and four placeholders


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3", "chameleon", "instructblip_t5", "ovis2"])
def test_other_hosts(name: str) -> None:
    case = ZOO[name]()
    rows = inspect_activity(adapted(case), case.batch)
    assert {row.branch for row in rows} >= {"text", "vision"}
    for row in rows:
        assert row.change_norm.isfinite().all()
        assert row.change_norm.any()


def test_composite_with_several_images_in_a_row() -> None:
    model = attach(build())
    randomize(model)
    batch = make_batch(model.get_base_model())
    rows = {row.branch: row for row in inspect_activity(model, batch)}
    asked = batch["attention_mask"].bool() & (batch["input_ids"] != model.config.image_token_id)
    assert len(rows["text"].gate) == int(asked.sum())  # the table reads another token where an image will stand
    assert len(rows["vision"].gate) == 3 * model.config.image_seq_length


def test_several_adapters_and_none() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    model.add_adapter("second", CromeConfig(branches=BOTH, bottleneck_dim=M))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"expected one, not merged\. Write model\.set_adapter\('default'\)"):
        inspect_activity(model, case.batch)
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="has no active CROME adapter"):
        inspect_activity(model, case.batch)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"model\.unmerge_adapter\(\)"):
        inspect_activity(model, case.batch)


@pytest.mark.slow
def test_quantized_backbone(tmp_path: Path) -> None:
    """On an 8-bit backbone, text has the embedding norms of the plain backbone. In 4-bit, the evaluation kernel of
    some CPUs needs layers of whole blocks, which are wider than these."""
    pytest.importorskip("bitsandbytes")
    from tests.zoo.test_quantized import quantized

    case = ZOO["llava"]()
    case.model.save_pretrained(tmp_path)
    model = attach(quantized(case, tmp_path, "int8"))
    randomize(model)
    rows = {row.branch: row for row in inspect_activity(model, case.batch)}
    plain = {row.branch: row for row in inspect_activity(adapted(case), case.batch)}
    # The embedding table is not quantized, so text reads the same.
    assert set(rows) == set(plain)
    torch.testing.assert_close(rows["text"].embedding_norm, plain["text"].embedding_norm)
