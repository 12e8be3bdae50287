"""Test `modules_to_save` beside an adapter, also for a module that is itself a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

from peft_crome import CromeConfig
from peft_crome.backbone.compat import has_composite
from tests.tuner.helpers import (
    BOTH,
    KEYS,
    assert_equal,
    attach,
    changed,
    crome_weight,
    frozen_logits,
    logits,
    randomize,
    snapshot,
    to_dtype,
    train_steps,
    trainable,
)
from tests.zoo import ZOO, Case
from tests.zoo.llava import internvl, llava

PROJECTOR = "model.multi_modal_projector"


def test_modules_to_save_trains_a_module_that_is_a_site() -> None:
    host = llava()
    model = attach(host.model, modules_to_save=["multi_modal_projector"])
    randomize(model)
    before = snapshot(model)
    losses = train_steps(model, host.batch)
    assert losses[-1] < losses[0]
    parts = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
    copies = f"base_model.model.{PROJECTOR}.base_layer.modules_to_save.default."
    assert changed(model, before) == {copies + part for part in parts} | {
        f"base_model.model.crome.{key}.default.weight" for key in KEYS
    }
    for name, tensor in llava().model.get_submodule(PROJECTOR).state_dict().items():
        kept = model.get_parameter(f"base_model.model.{PROJECTOR}.base_layer.original_module.{name}")
        assert_equal(kept.detach(), tensor)


@pytest.mark.parametrize(
    "names", [["multi_modal_projector"], [PROJECTOR], ["lm_head"], ["multi_modal_projector", "lm_head"]]
)
def test_modules_to_save_reload_equal_and_unload(names: list[str], tmp_path: Path) -> None:
    host = llava()
    base = frozen_logits(host)
    model = attach(host.model, modules_to_save=names)
    randomize(model)
    train_steps(model, host.batch)
    expected = logits(model.eval(), host.batch)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(llava().model, str(tmp_path))
    assert_equal(logits(loaded, host.batch), expected)
    with model.disable_adapter():
        assert_equal(logits(model, host.batch), base)

    unloaded = model.unload()
    assert not [path for path, _ in unloaded.named_modules() if "crome" in path or "modules_to_save" in path]


def test_modules_to_save_in_two_adapters_are_two_copies() -> None:
    host = llava()
    config = {"bottleneck_dim": 4, "modules_to_save": ["multi_modal_projector"]}
    model = attach(host.model, modules_to_save=["multi_modal_projector"])
    model.add_adapter("other", CromeConfig(branches=BOTH, **config))
    randomize(model)
    train_steps(model, host.batch)
    copies = f"base_model.model.{PROJECTOR}.base_layer.modules_to_save"
    trained = model.get_parameter(f"{copies}.default.linear_1.weight")
    assert not torch.equal(trained, model.get_parameter(f"{copies}.other.linear_1.weight"))
    model.set_adapter("other")
    assert {path for path in trainable(model) if "modules_to_save" in path} == {
        f"{copies}.other.linear_{i}.{what}" for i in (1, 2) for what in ("weight", "bias")
    }


@pytest.mark.parametrize("indices", [[5, 6], {"embed_tokens": [5, 6]}], ids=["list", "dict"])
def test_trainable_tokens_train_inside_the_text_site(indices: list | dict, tmp_path: Path) -> None:
    host = llava()
    model = attach(host.model, trainable_token_indices=indices)
    randomize(model)
    before = snapshot(model)
    train_steps(model, host.batch)
    others = changed(model, before) - {f"base_model.model.crome.{key}.default.weight" for key in KEYS}
    assert len(others) == 1
    assert "token_adapter.trainable_tokens_delta.default" in others.pop()
    expected = logits(model.eval(), host.batch)
    model.save_pretrained(tmp_path)
    assert_equal(logits(PeftModel.from_pretrained(llava().model, tmp_path), host.batch), expected)


def test_a_configuration_can_be_used_for_another_model() -> None:
    """One configuration can serve two models in turn, and each model keeps the object itself, as in PEFT. What was
    filled in for the first model causes no warning on the second."""
    config = CromeConfig(bottleneck_dim=4, modules_to_save=["multi_modal_projector"])
    for host in (llava(), internvl()):
        model = get_peft_model(host.model, config)
        assert model.peft_config["default"] is config
        assert config.trained_on is not None
        assert config.trained_on["model_type"] == host.model.config.model_type
        assert "base_model.model.model.multi_modal_projector.base_layer" in "\n".join(trainable(model))


@pytest.mark.parametrize(
    "config", [{"trainable_token_indices": [5, 6]}, {"modules_to_save": ["embed_tokens"]}], ids=["tokens", "table"]
)
def test_a_table_that_trains_folds_when_it_is_unloaded(config: dict) -> None:
    host = llava()
    model = attach(host.model, branches=["text"], **config)
    randomize(model)
    train_steps(model, host.batch)
    expected = logits(model.eval(), host.batch)
    with pytest.raises(ValueError, match=r"embed_tokens'\] trains as well .* Write merge_and_unload\(\)"):
        model.merge_adapter()
    assert_equal(logits(model, host.batch), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, host.batch), expected, atol=1e-5, rtol=1e-5)
    assert not [path for path, _ in merged.named_modules() if "token_adapter" in path or "modules_to_save" in path]


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "paligemma",
        "florence2",
        pytest.param("composite", marks=pytest.mark.skipif(not has_composite(), reason="needs transformers 5.12")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no longer tied")  # true, and test_peft_contract.py expects it
def test_trained_tokens_are_trained_in_a_tied_head_as_well(name: str, tmp_path: Path) -> None:
    """Tokens that train also train in a tied head, which is PEFT's rule. A site around the table must not hide this,
    so the merged model equals the attached one."""
    case = ZOO[name]() if name != "composite" else tied_composite()
    also = {"branches": {"text": case.sites["text"]}, "trainable_token_indices": [5, 6]}
    model = attach(case.model, **also)
    before = logits(model.eval(), case.batch)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "trainable_tokens_delta" in path:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = logits(model, case.batch)
    assert ((expected - before).abs().amax(dim=(0, 1))[[5, 6]] > 0.1).all()
    randomize(model)
    expected = logits(model, case.batch)
    model.save_pretrained(tmp_path)
    again = ZOO[name]() if name != "composite" else tied_composite()
    assert_equal(logits(PeftModel.from_pretrained(again.model, tmp_path).eval(), case.batch), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), case.batch), expected, atol=1e-4, rtol=1e-4)


def tied_composite() -> Case:
    from peft_crome import CromeVLMForConditionalGeneration
    from tests.vlm.tiny import build, make_batch

    torch.manual_seed(0)
    language = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    tower = build().vision_tower
    torch.manual_seed(0)
    host = CromeVLMForConditionalGeneration.from_backbones(tower, LlamaForCausalLM(language), image_token_id=100)
    return Case(host.eval(), make_batch(host), {"text": ["embed_tokens"]}, None)


def test_a_second_adapter_s_tokens_in_a_tied_head() -> None:
    """Each adapter changes its own tokens in a tied head. An adapter without trained tokens changes none."""
    case = ZOO["gemma3"]()
    text = {"text": case.sites["text"]}
    model = attach(case.model, branches=text, trainable_token_indices=[5, 6])
    model.add_adapter("other", CromeConfig(bottleneck_dim=4, branches=text, trainable_token_indices=[7]))
    model.add_adapter("none", CromeConfig(bottleneck_dim=4, branches=text))
    base = logits(model.eval(), case.batch)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "trainable_tokens_delta" in path:
                parameter.add_(1.0)
    moved = {}
    for adapter in ("default", "other", "none"):
        model.set_adapter(adapter)
        most = (logits(model, case.batch) - base).abs().amax(dim=(0, 1))
        moved[adapter] = {token for token in (5, 6, 7) if most[token] > 10 * most[50]} if most.any() else set()
    assert moved == {"default": {5, 6}, "other": {7}, "none": set()}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_heads_that_peft_adds_for_a_task(task_type: str, tmp_path: Path) -> None:
    """The head that PEFT adds for a task trains and is reloaded. PEFT names every head that a classifier can have, but
    a model has only one of them."""

    def classifier() -> torch.nn.Module:
        torch.manual_seed(0)
        settings = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = LlamaConfig(**settings, num_attention_heads=2, pad_token_id=0, num_labels=3)
        kinds = {"SEQ_CLS": LlamaForSequenceClassification, "TOKEN_CLS": LlamaForTokenClassification}
        return kinds[task_type](config).eval()

    branches = {"text": ["embed_tokens"]}
    model = attach(classifier(), task_type=task_type, branches=branches)
    assert "base_model.model.score.modules_to_save.default.weight" in trainable(model)
    randomize(model)
    model.save_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    assert_equal(logits(loaded, batch), logits(model.eval(), batch))
    with pytest.raises(ValueError, match="'classifer' matches no module"):
        attach(classifier(), task_type=task_type, branches=branches, modules_to_save=["classifer"])


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("what", ["projector", "table", "tokens"])
def test_a_copy_on_a_half_precision_host_stays_in_its_dtype(
    what: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Copies that train stay in the host's half precision, and the adapter is float32. `forward`, `backward` and
    `generate` work without autocast, as LoRA's do, also after a reload."""

    def host() -> Any:
        case = ZOO[name]()
        return Case(case.model.to(dtype), to_dtype(case.batch, dtype), case.sites, None)

    case = host()
    sites = case.sites["vision"] if what == "projector" else case.sites["text"]
    also = {"trainable_token_indices": [5, 6]} if what == "tokens" else {"modules_to_save": sites}
    model = attach(case.model, branches=[*case.sites], **also)
    randomize(model)
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save.default." in n}
    assert {parameter.dtype for parameter in copies.values()} <= {dtype}
    assert bool(copies) == (what != "tokens")
    assert crome_weight(model, "up").dtype == torch.float32
    expected = logits(model.eval(), case.batch)
    assert expected.dtype == dtype
    model.generate(**case.generate_inputs(), max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(host().model, tmp_path).eval()
    assert_equal(logits(loaded, case.batch), expected)
    loaded.generate(**case.generate_inputs(), max_new_tokens=2, do_sample=False)
    model.train()(**case.batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
