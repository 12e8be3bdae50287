"""Test that a folded checkpoint with the encoder's embeddings matches the adapted model in stock transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peft_crome.serving import ImageEncoder, fold, host_files
from peft_crome.serving.encoder import NOT_IN_VLLM
from tests.test_mixed_batch import qformer_composite
from tests.tuner.helpers import adapted, assert_equal, attach, changed, logits, randomize, snapshot, unchanged
from tests.tuner.test_compiled_host import HOSTS
from tests.vlm.tiny import build, make_batch
from tests.zoo import ZOO, Case

TOKENS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": [60]}


def assert_serves(case: Case, folder: Path, tolerance: float) -> float:
    """Assert equal logits up to rounding and the same greedy tokens. Return the largest difference of logits."""
    model = adapted(case)
    expected = logits(model, case.batch)
    tokens = model.generate(**case.generate_inputs(), **TOKENS)
    fold(model, folder / "folded")
    assert_equal(logits(model, case.batch), expected)  # the model is as it was
    stock = type(case.model).from_pretrained(folder / "folded", dtype=case.model.dtype).eval()
    assert not [name for name in stock.state_dict() if "crome" in name or "base_layer" in name]
    own = case.model.get_image_features(
        **{k: v for k, v in case.batch.items() if k in ("pixel_values", "image_grid_thw")}
    )
    parts = ImageEncoder(model)(**case.batch)
    as_tensor = isinstance(own.pooler_output, torch.Tensor)  # some hosts take one, others one for each image
    images = BaseModelOutputWithPooling(pooler_output=torch.stack(parts) if as_tensor else tuple(parts))
    given = {"mm_encoder_outputs": {"image": images}}
    pixels = ("pixel_values", "labels")
    batch = {key: value for key, value in case.batch.items() if key not in pixels}
    found = logits(stock, batch | given)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    inputs = {key: value for key, value in case.generate_inputs().items() if key not in pixels}
    if stock.dtype == torch.float32:  # elsewhere random weights put tokens closer together than a rounding
        assert torch.equal(stock.generate(**inputs, **given, **TOKENS), tokens)
    without = logits(stock, {key: value for key, value in case.batch.items() if key != "labels"})
    assert not torch.allclose(without, expected, rtol=tolerance, atol=tolerance)  # images come in without the adapter
    return float((found - expected).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl", "smolvlm"])
def test_hosts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A folded host serves the logits of the adapted model. A product of all of a table's rows may round differently
    from one of a few rows, and Gemma scales its rows."""
    case = ZOO[name]()
    case.model.to(dtype)
    case.batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.batch.items()}
    difference = assert_serves(case, tmp_path, 1e-4 if dtype == torch.float32 else 0.1)
    print(f"{name} {dtype}: largest difference of logits {difference:.2g}")


def test_composite(tmp_path: Path) -> None:
    """The folded language model alone gives the composite's logits and tokens, with whole prompts as embeddings."""
    model = attach(build())
    randomize(model)
    batch = make_batch(model.get_base_model())
    expected = logits(model.eval(), batch)
    fold(model, tmp_path / "folded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    for row, prompt in enumerate(ImageEncoder(model).prompt_embeds(**batch)):
        found = logits(stock, {"inputs_embeds": prompt[None]})[0]
        torch.testing.assert_close(found, expected[row][batch["attention_mask"][row].bool()], rtol=1e-4, atol=1e-4)
        alone = {key: value[row : row + 1] for key, value in batch.items() if key != "pixel_values"}
        images = slice(*[(0, 1), (0, 0), (1, 3)][row])
        if images.stop:
            alone["pixel_values"] = batch["pixel_values"][images]
        tokens = model.generate(**alone, **TOKENS)[:, -8:]
        assert torch.equal(stock.generate(inputs_embeds=prompt[None], **TOKENS), tokens)


def test_seq2seq_composite(tmp_path: Path) -> None:
    model = attach(build(language="t5"))
    randomize(model)
    batch = make_batch(model.get_base_model()) | {"labels": torch.tensor([[9, 10, 1]] * 3)}
    expected = logits(model.eval(), batch)
    fold(model, tmp_path / "folded")
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "folded").eval()
    embeddings = list(ImageEncoder(model)(**batch))
    assert len(embeddings) == 3
    assert embeddings[0].shape == (model.get_base_model().image_seq_length, model.config.get_text_config().hidden_size)
    table = stock.get_input_embeddings()
    prompt = table(batch["input_ids"].clamp(max=table.num_embeddings - 1))
    is_image = batch["input_ids"] == model.get_base_model().config.image_token_id
    prompt[is_image] = torch.cat(embeddings)
    row = 2  # the longest, without padding
    found = logits(stock, {"inputs_embeds": prompt[row : row + 1], "labels": batch["labels"][row : row + 1]})
    torch.testing.assert_close(found[0], expected[row], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `_thread.get_ident")
@pytest.mark.parametrize("name", HOSTS)
def test_hosts_that_forward_to_another_module(name: str, tmp_path: Path) -> None:
    """The checkpoint and embeddings of a host that wraps another module are those of the module inside."""
    case = ZOO["llava"]()
    plain = adapted(ZOO["llava"]())
    model = attach(HOSTS[name](case.model))
    randomize(model)
    model.eval()
    for parameter, value in zip(crome_weights(model), crome_weights(plain), strict=True):
        parameter.data.copy_(value)
    modules = [*model.modules()]
    fold(plain, tmp_path / "plain")
    fold(model, tmp_path / "folded")
    assert [*model.modules()] == modules
    expected, found = (load_file(tmp_path / which / "model.safetensors") for which in ("plain", "folded"))
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    for one, other in zip(ImageEncoder(model)(**case.batch), ImageEncoder(plain)(**case.batch), strict=True):
        torch.testing.assert_close(one, other)


def crome_weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".crome." in name]


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `_thread.get_ident")
@pytest.mark.parametrize("what", ["composite", "language model"])
def test_compiled_composite(what: str, tmp_path: Path) -> None:
    host = build()
    batch = make_batch(host)
    if what == "composite":
        model = attach(torch.compile(host, backend="eager"))
    else:
        host.language_model = torch.compile(host.language_model, backend="eager")
        model = attach(host)
    randomize(model)
    expected = logits(model.eval(), batch)
    fold(model, tmp_path / "folded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    for row, prompt in enumerate(ImageEncoder(model).prompt_embeds(**batch)):
        found = logits(stock, {"inputs_embeds": prompt[None]})[0]
        torch.testing.assert_close(found, expected[row][batch["attention_mask"][row].bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bart composite", "florence2"])
def test_tables_that_were_tied_to_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tied tables are in the file once the tie is off, and logits stay the same. BART has one in each half."""
    if name == "florence2":
        case = ZOO[name]()
        model, batch, kind = attach(case.model, branches={"text": case.sites["text"]}), case.batch, type(case.model)
        target = case.model
    else:
        host = build(language="bart")
        target, model, kind = host.language_model, attach(host), AutoModelForSeq2SeqLM
        batch = {"input_ids": torch.tensor([[1, 5, 6]]), "decoder_input_ids": torch.tensor([[2, 5]])}
    randomize(model)
    expected, before = logits(model.eval(), batch), snapshot(model)
    fold(model, tmp_path / "folded")
    assert not changed(model, before)
    assert target.config.tie_word_embeddings
    stock, found = kind.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not found["missing_keys"]
    torch.testing.assert_close(logits(stock.eval(), batch), expected, rtol=1e-5, atol=1e-5)
    assert target.get_output_embeddings().weight is target.get_input_embeddings().weight
    monkeypatch.setattr(host_files, "separate", lambda *_: [])  # what is written is compared with what a reader needs
    with pytest.raises(ValueError, match=r"2 missing: \['model.*decoder.embed_tokens.weight'"):
        fold(model, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_shapes_that_engines_take() -> None:
    """Images have a shape that vLLM takes: one tensor of all images, or all tokens with the grid that numbers them."""
    case = ZOO["llava"]()
    data = ImageEncoder(adapted(case)).multi_modal_data(**case.batch)
    assert data["image"].shape == (2, 4, 32)
    case = ZOO["qwen2_5_vl"]()
    data = ImageEncoder(adapted(case)).multi_modal_data(**case.batch)["image"]
    assert data["image_embeds"].shape == (8, 32)
    assert torch.equal(data["image_grid_thw"], case.batch["image_grid_thw"])
    model = attach(build()).eval()
    batch = make_batch(model.get_base_model())
    length = model.get_base_model().image_seq_length
    assert ImageEncoder(model).multi_modal_data(**batch)["image"].shape[:2] == (3, length)
    rows = [int(mask.sum()) for mask in batch["attention_mask"]]
    assert [len(prompt) for prompt in ImageEncoder(model).prompt_embeds(**batch)] == rows


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", *sorted(ZOO.keys() & set(NOT_IN_VLLM))])
def test_hosts_whose_embeddings_vllm_does_not_take_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A warning names each host whose image embeddings vLLM does not take. The tests in tests/engine ask vLLM for
    these hosts and for families outside the zoo."""
    case = ZOO[name]()
    with caplog.at_level(logging.WARNING, "peft_crome"):
        ImageEncoder(adapted(case)).multi_modal_data(**case.batch)
    assert (f"does not serve image embeddings of {name!r}" in caplog.text) == (name in NOT_IN_VLLM)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_what_is_refused(tmp_path: Path) -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    (tmp_path / "there").mkdir()
    with unchanged(model), pytest.raises(FileExistsError, match="exists already, and nothing was written"):
        fold(model, tmp_path / "there")
    encoder = ImageEncoder(model)
    with pytest.raises(ValueError, match=r"inputs have \['input_ids'\]; expected images: processor\(images"):
        encoder(input_ids=case.batch["input_ids"])
    with pytest.raises(ValueError, match="prompt_embeds are for a composite"):
        encoder.prompt_embeds(**case.batch)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already. Write model.unmerge_adapter\(\) first"):
        fold(model, tmp_path / "new")
    model.unmerge_adapter()
    trained = attach(ZOO["llava"]().model, modules_to_save=["lm_head"])
    with unchanged(trained), pytest.raises(ValueError, match=r"lm_head.* has a copy for each adapter"):
        fold(trained, tmp_path / "new")
    lora = get_peft_model(ZOO["llava"]().model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has no adapter of CROME's"):
        fold(lora, tmp_path / "new")
    both = get_peft_model(ZOO["llava"]().model, LoraConfig(target_modules=r".*language_model.*q_proj"), "words")
    both = attach(both.get_base_model(), "images")
    with unchanged(both), pytest.raises(ValueError, match=r"carry adapters of another PEFT method"):
        fold(both, tmp_path / "new")
    queries = attach(qformer_composite())
    with pytest.raises(ValueError, match="nothing to fold: no branch of this adapter is on an embedding table"):
        fold(queries, tmp_path / "new")
    deep = ZOO["qwen3_vl"]()
    with pytest.raises(ValueError, match=r"also reads \['deepstack_features'\] inside"):
        ImageEncoder(adapted(deep))(**deep.batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]  # nothing half-written
