"""Test `resize_token_embeddings` under an adapter. Known words keep their logits, and new words are adapted too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from peft_crome import CromeConfig, CromeLayer
from tests.vlm.test_qformer import qformer_batch, with_qformer
from tests.vlm.tiny import build, make_batch
from tests.zoo import ZOO

BOTH = "text and vision"


def host_of(name: str) -> tuple[Any, dict[str, Any], dict[str, list[str]]]:
    """Return a model, a batch, and the sites of both branches."""
    if name.startswith("composite"):
        language = name.partition(" ")[2]
        if language == "Q-Former":
            model: Any = with_qformer()
            return model, qformer_batch(model), {"text": ["text_fusion"], "vision": ["vision_fusion"]}
        model = build(language=language)
        target = {"decoder_input_ids": torch.tensor([[0, 5]] * 3)} if model.config.is_encoder_decoder else {}
        tables = {
            "t5": [f"language_model.{part}" for part in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")],
            "bart": [f"language_model.model.{part}embed_tokens" for part in ("encoder.", "decoder.")],
            "gpt2": ["language_model.transformer.wte"],
        }.get(language, ["language_model.model.embed_tokens"])
        return model, make_batch(model) | target, {"text": tables, "vision": ["vision_fusion"]}
    case = ZOO[name]()
    return case.model.eval(), case.batch, case.sites


def adapted(name: str, branches: str, **kwargs: Any) -> tuple[PeftModel, dict[str, Any]]:
    model, batch, sites = host_of(name)
    named = {branch: found for branch, found in sites.items() if branches == BOTH or branch != "text"}
    config = CromeConfig(bottleneck_dim=4, init_weights=False, branches=named, **kwargs)
    return get_peft_model(model, config).eval(), batch


HOSTS = ("llava", "qwen2_5_vl", "paligemma", "udop", "composite llama", "composite gpt2", "composite Q-Former")
HOSTS += ("composite t5", "composite bart")


@pytest.mark.parametrize("through", ["the PEFT model", "the host"])
@pytest.mark.parametrize("branches", ["vision", BOTH])
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_words_there_were_mean_what_they_did(name: str, branches: str, through: str) -> None:
    model, batch = adapted(name, branches)
    host = model.get_base_model()
    before = model(**batch).logits
    sites = {path: module for path, module in model.named_modules() if isinstance(module, CromeLayer)}
    rows = host.get_input_embeddings().num_embeddings
    table = (model if through == "the PEFT model" else host).resize_token_embeddings(rows + 5, mean_resizing=False)
    after = model(**batch).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    assert after.shape[-1] == before.shape[-1] + 5
    assert table.weight.shape[0] == host.get_input_embeddings().num_embeddings == rows + 5
    assert host.config.get_text_config().vocab_size == rows + 5
    assert {path: module for path, module in model.named_modules() if isinstance(module, CromeLayer)} == sites
    for site in sites.values():
        if isinstance(site.base_layer, torch.nn.Embedding):
            assert (site.num_embeddings, site.in_features) == (rows + 5, rows + 5)
    host.resize_token_embeddings(rows, mean_resizing=False)
    torch.testing.assert_close(model(**batch).logits, before)


@pytest.mark.parametrize("name", ["llava", "composite llama"])
@torch.no_grad()
def test_new_words_are_adapted(name: str) -> None:
    model, _ = adapted(name, BOTH)
    host = model.get_base_model()
    rows = host.get_input_embeddings().num_embeddings
    new = rows + 1  # of the composite, the id after the table's last is the image placeholder's
    model.resize_token_embeddings(new + 1)
    host.get_input_embeddings().weight[new] = host.get_input_embeddings().weight[7]
    with_it, without = (model(input_ids=torch.tensor([[1, word, 5]])).logits for word in (new, 7))
    torch.testing.assert_close(with_it, without)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=torch.tensor([[1, new, 5]])).logits, with_it)


# Of a vocabulary as small as this, other rows are compared once it has grown.
@pytest.mark.filterwarnings("ignore:This adapter was trained on another model:UserWarning")
@pytest.mark.parametrize("name", ["llava", "composite gpt2"])
def test_it_trains_is_saved_loaded_and_unloaded(name: str, tmp_path: Path) -> None:
    model, batch = adapted(name, BOTH)
    host = model.get_base_model()
    rows = host.get_input_embeddings().num_embeddings + 5
    model.resize_token_embeddings(rows)
    model.train()(**{**batch, "labels": batch["input_ids"]}).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert type(base.get_input_embeddings()) is not CromeLayer
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # PEFT's, of any method
def test_an_integrated_adapter_and_two_adapters() -> None:
    case = ZOO["llava"]()
    for name in ("one", "two"):
        case.model.add_adapter(CromeConfig(bottleneck_dim=4, init_weights=False, branches=case.sites), name)
    batch, expected = case.batch, {}
    for name in ("one", "two"):
        case.model.set_adapter(name)
        expected[name] = case.model.eval()(**batch).logits
    case.model.resize_token_embeddings(expected["one"].shape[-1] + 3)
    for name, before in expected.items():
        case.model.set_adapter(name)
        torch.testing.assert_close(case.model(**batch).logits[..., :-3], before)


@pytest.mark.parametrize("trained", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}])
@pytest.mark.parametrize("branches", ["vision", BOTH])
def test_a_table_that_trains_is_refused_and_left(branches: str, trained: dict[str, Any]) -> None:
    model, batch = adapted("llava", branches, **trained)
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(ValueError, match=r"(?s)embedding table trains.*before get_peft_model"):
            model.resize_token_embeddings(90)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("through", ["the PEFT model", "the host"])
@pytest.mark.parametrize("branches", ["vision", BOTH])
@pytest.mark.parametrize(
    ("trained", "named"),
    [(["lm_head"], "output head trains"), (["language_model"], "embedding table trains")],
)
def test_a_trained_module_with_a_row_for_each_word_is_refused_and_left(
    trained: list[str], named: str, branches: str, through: str
) -> None:
    model, batch = adapted("llava", "vision" if trained == ["language_model"] else branches, modules_to_save=trained)
    host = model.get_base_model()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(ValueError, match=rf"(?s){named}.*before get_peft_model"):
            (model if through == "the PEFT model" else host).resize_token_embeddings(70)
        assert torch.equal(model(**batch).logits, before)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert host.config.get_text_config().vocab_size == before.shape[-1]


def test_a_trained_module_of_another_size_does_not_matter() -> None:
    model, batch = adapted("llava", BOTH, modules_to_save=["multi_modal_projector"])
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(before.shape[-1] + 6, mean_resizing=False)
        torch.testing.assert_close(model(**batch).logits[..., :-6], before)


def test_a_folded_table_is_refused_until_it_is_unmerged() -> None:
    model, batch = adapted("llava", BOTH)
    with torch.no_grad():
        before = model(**batch).logits
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
            model.resize_token_embeddings(90)
        model.unmerge_adapter()
        model.resize_token_embeddings(90)
        torch.testing.assert_close(model(**batch).logits[..., : before.shape[-1]], before)


def test_a_failed_resize_leaves_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = adapted("llava", BOTH)
    host = model.get_base_model()
    with torch.no_grad():
        before = model(**batch).logits

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(host), "set_input_embeddings", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.resize_token_embeddings(90)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


def test_models_without_an_adapter_are_as_ever(tmp_path: Path) -> None:
    case = ZOO["llava"]()
    case.model.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.resize_token_embeddings(90).num_embeddings == 90
    assert model.resize_token_embeddings() is model.get_input_embeddings()
