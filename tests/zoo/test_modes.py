"""Test that the adapter acts in each way to run a host: generation, attention, padding, dtypes, compilation
and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.tuner.helpers import adapted, assert_equal, frozen_logits, logits, to_dtype
from tests.zoo import ZOO, Batch, Case

HOSTS = ("llava", "qwen2_5_vl", "gemma3", "idefics3", "instructblip", "instructblip_t5")
DECODERS = tuple(name for name in HOSTS if not name.endswith("t5"))
TOKENS = 5

each_host = pytest.mark.parametrize("name", HOSTS)
each_decoder = pytest.mark.parametrize("name", DECODERS)


def generate(model: PeftModel, case: Case, **settings: Any) -> Any:
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
    torch.manual_seed(0)
    return model.generate(**case.generate_inputs(), **options | settings, output_logits=True)


def continued(case: Case, new: torch.Tensor) -> Batch:
    """Return the batch with the generated tokens appended, to be read in one forward pass."""
    batch = dict(case.generate_inputs())
    if case.model.config.get_text_config().is_encoder_decoder:
        return batch | {"decoder_input_ids": new}
    batch["input_ids"] = torch.cat([batch["input_ids"], new], dim=1)
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in batch:
            filling = torch.ones_like(new) if key == "attention_mask" else torch.zeros_like(new)
            batch[key] = torch.cat([batch[key], filling], dim=1)
    return batch


def assert_logits_are_those_of_forward(model: PeftModel, case: Case, output: Any) -> None:
    """Assert that the logits of `generate` equal those of one `forward` pass, and that the adapter changes them."""
    seq2seq = case.model.config.get_text_config().is_encoder_decoder
    sequences, steps = output.sequences, torch.stack(output.logits, dim=1)
    new = sequences[:, :-1] if seq2seq else sequences[:, -TOKENS:]
    expected = logits(model, continued(case, new))
    expected = expected if seq2seq else expected[:, -TOKENS - 1 : -1]
    torch.testing.assert_close(steps, expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(steps[:, 0], generate(model, case).logits[0], atol=1e-4)


@each_host
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 8}, {"use_cache": False}], ids=str)
def test_generate_computes_what_forward_does(name: str, settings: dict[str, Any]) -> None:
    case = ZOO[name]()
    model = adapted(case)
    assert_logits_are_those_of_forward(model, case, generate(model, case, **settings))


@each_decoder
def test_static_cache(name: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    expected = generate(model, case)
    output = generate(model, case, cache_implementation="static", disable_compile=True)
    assert torch.equal(output.sequences, expected.sequences)
    for step, other in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, other, atol=1e-4, rtol=1e-4)


@each_host
def test_beam_search(name: str) -> None:
    """Beam search scores its beams with the adapter. The scores equal those of one forward pass over the sequences."""
    case = ZOO[name]()
    model = adapted(case)
    output = generate(model, case, num_beams=3, length_penalty=0.0, output_scores=True)
    seq2seq = case.model.config.get_text_config().is_encoder_decoder
    new = output.sequences[:, 1:] if seq2seq else output.sequences[:, -TOKENS:]
    full = logits(model, continued(case, output.sequences[:, :-1] if seq2seq else new))
    full = full if seq2seq else full[:, -TOKENS - 1 : -1]
    log_probabilities = full.log_softmax(-1)
    end = case.model.generation_config.eos_token_id
    if end is not None:
        log_probabilities[:, : TOKENS - 1, end] = -torch.inf  # min_new_tokens
    scores = log_probabilities.gather(-1, new[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(output.sequences_scores, scores, atol=1e-3, rtol=1e-3)


@each_decoder
def test_assisted_generation_is_greedy_generation(name: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    inputs = {key: value[: len(value) // 2] for key, value in case.generate_inputs().items()}  # it takes one row
    greedy = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    assisted = model.generate(
        **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, prompt_lookup_num_tokens=2
    )
    assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "instructblip"])  # it wants the image again
def test_generation_continues_from_a_cache(name: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    at_once = generate(model, case, max_new_tokens=2 * TOKENS, min_new_tokens=2 * TOKENS).sequences
    first = generate(model, case)
    inputs = {k: v for k, v in continued(case, first.sequences[:, -TOKENS:]).items() if "token_type" not in k}
    images = {k for k in inputs if k not in ("input_ids", "attention_mask") and not k.startswith("qformer")}
    text = {k: v for k, v in inputs.items() if k not in images}
    more = model.generate(
        **text, past_key_values=first.past_key_values, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )
    assert torch.equal(more, at_once)


@each_host
def test_attention_implementations_agree(name: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    found = {}
    for implementation in ("eager", "sdpa"):
        case.model.set_attn_implementation(implementation)
        found[implementation] = logits(model, case.batch)
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-4, rtol=1e-4)


@each_decoder
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    expected = logits(model, case.batch)
    fill = {"input_ids": 0, "labels": -100}
    batch = dict(case.batch)
    for key in ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
        if key in batch:
            padding = torch.full((2, 3), fill.get(key, 0))
            batch[key] = torch.cat([padding, batch[key]] if side == "left" else [batch[key], padding], dim=1)
    if side == "left" and name in ("llava", "idefics3", "gemma3"):  # the others count positions by the mask
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, batch)
    padded = padded[:, 3:] if side == "left" else padded[:, :-3]
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=1e-4)


def test_rows_without_an_image_go_with_rows_that_have_one() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    ids, length = case.batch["input_ids"], case.batch["input_ids"].shape[1]
    words = torch.tensor([[1, 9, 10, 11]])
    row = torch.cat([words, torch.zeros(1, length - 4, dtype=torch.long)], dim=1)
    mixed = {
        "input_ids": torch.cat([ids[:1], row]),
        "attention_mask": torch.cat([torch.ones_like(ids[:1]), (row != 0).long()]),
        "pixel_values": case.batch["pixel_values"][:1],
    }
    together = logits(model, mixed)
    torch.testing.assert_close(together[1:, :4], logits(model, {"input_ids": words}), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:1], logits(model, case.batch)[:1], atol=1e-4, rtol=1e-4)


@each_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The adapter acts in half precision, and nothing overflows. `test_zoo.py` tests that a fresh adapter is
    an identity."""
    case, wide = ZOO[name](), ZOO[name]()
    torch.manual_seed(0)
    exact = logits(adapted(wide), wide.batch)
    case.model.to(dtype)
    batch = to_dtype(case.batch, dtype)
    base = frozen_logits(Case(case.model, batch, case.sites, None))
    torch.manual_seed(0)
    found = logits(adapted(case), batch)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    assert (found - base).abs().max() > 5 * (found.float() - exact).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_compiled_model_gives_equal_logits(name: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    expected = logits(model, case.batch)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, case.batch), expected, atol=1e-4, rtol=1e-4)


@each_host
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_logits(name: str, use_reentrant: bool) -> None:
    case = ZOO[name]()
    model = adapted(case)
    expected = model(**case.batch).logits.detach()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    output = model.train()(**case.batch)
    torch.testing.assert_close(output.logits.detach(), expected, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("crome_" in path), path


def test_two_rows_equal_one_row_each() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    together = logits(model, case.batch)
    for i in range(2):
        alone = logits(model, {key: value[i : i + 1] for key, value in case.batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_scaled_tables_are_adapted_after_scaling() -> None:
    """The text branch reads the embeddings after Gemma has scaled them, as the language model does."""
    case = ZOO["gemma3"]()
    model = adapted(case)
    layer = case.model.get_submodule(case.sites["text"][0])
    ids = torch.arange(8)
    with torch.no_grad():
        plain = layer.base_layer(ids)
        assert_equal(plain, layer.base_layer.weight[ids] * layer.base_layer.embed_scale)
        assert_equal(layer(ids), plain + model.base_model.model.crome(plain, "text", "default"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "glm4v", "internvl"])
def test_embeddings_of_the_table_show_where_images_go(name: str) -> None:
    """Models accept embeddings of the table as `inputs_embeds` instead of ids. They locate placeholders by comparing
    embeddings bit for bit."""
    case = ZOO[name]()
    model = adapted(case)
    batch = {key: value for key, value in case.batch.items() if key != "input_ids"}
    with torch.no_grad():
        embeddings = case.model.get_input_embeddings()(case.batch["input_ids"])
    given, expected = logits(model, batch | {"inputs_embeds": embeddings}), logits(model, case.batch)
    if name.startswith(("qwen", "glm")):  # without ids, these count image positions as text
        assert given.shape == expected.shape
    else:
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
