"""Test that the composite generates over text and images with its language model's own generation."""

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, GenerationConfig, StaticCache

from peft_crome import CromeConfig
from tests.vlm.test_qformer import with_qformer
from tests.vlm.tiny import IMAGE_ID, LANGUAGE_MODELS, SEQ2SEQ, build, make_batch


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_greedy_equals_full_recomputation(language):
    model = build(language=language)
    batch = make_batch(model)
    found = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    seq2seq = language in SEQ2SEQ
    written = found[:, :1] if seq2seq else batch["input_ids"]
    mask = batch["attention_mask"]
    for _ in range(5):
        if seq2seq:
            logits = model(**batch, decoder_input_ids=written).logits
        else:
            logits = model(**{**batch, "input_ids": written, "attention_mask": mask}).logits
        step = logits[:, -1].clone()
        step[:, 2] = -torch.inf  # min_new_tokens forbids the end token
        written = torch.cat([written, step.argmax(-1, keepdim=True)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found[:, : written.shape[1]], written)


@pytest.mark.parametrize("language", ["llama", "gpt2", "qwen3"])
def test_right_padding_generates_the_same(language):
    model = build(language=language)
    left, right = (
        model.generate(**make_batch(model, side=side), max_new_tokens=4, do_sample=False) for side in ("left", "right")
    )
    assert torch.equal(left, right)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_prompt_keeps_its_image_ids_in_every_sequence(options):
    model = build()
    batch = make_batch(model)
    found = model.generate(**batch, max_new_tokens=3, **options)
    assert torch.equal(found[:, : batch["input_ids"].shape[1]], batch["input_ids"].repeat_interleave(2, dim=0))
    whole = model.generate(
        **batch, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, do_sample=False
    )
    assert (whole.sequences == IMAGE_ID).sum() == 27
    assert len(whole.scores) >= 1


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_caches_write_the_same(options):
    model = build()
    batch = make_batch(model, images_per_row=(1,))
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, **options), expected)


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_model"])
def test_guessing_ahead_is_refused(option):
    model = build()
    batch = make_batch(model, images_per_row=(1,))
    value = {"prompt_lookup_num_tokens": 3, "assistant_model": model.language_model}[option]
    with pytest.raises(ValueError, match=f"{option} does not work here"):
        model.generate(**batch, max_new_tokens=3, **{option: value})


def test_guessing_ahead_by_a_generation_config_is_refused():
    model = build()
    batch = make_batch(model, images_per_row=(1,))
    settings = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens does not work here"):
        model.generate(**batch, generation_config=settings)


def test_cached_features_text_alone_and_embeddings():
    model = build()
    batch = make_batch(model)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    features = model.get_vision_features(batch["pixel_values"])
    cached = {k: v for k, v in batch.items() if k != "pixel_values"}
    assert torch.equal(model.generate(**cached, vision_features=features, max_new_tokens=4, do_sample=False), expected)
    _, embeds, _ = model.embed_inputs(batch["input_ids"], batch["pixel_values"])
    new = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False
    )
    assert torch.equal(new, expected[:, batch["input_ids"].shape[1] :])
    ids = torch.tensor([[1, 5, 6]])
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(text, model.language_model.generate(ids, max_new_tokens=4, do_sample=False))


def test_images_without_ids_are_refused():
    model = build()
    with pytest.raises(ValueError, match="Images need input_ids"):
        model.generate(pixel_values=make_batch(model)["pixel_values"])


def test_generation_config_is_the_language_models():
    model = build()
    model.generation_config.max_new_tokens = 2
    assert model.language_model.generation_config is model.generation_config
    assert model.generate(torch.tensor([[1, 5]]), min_new_tokens=2).shape == (1, 4)


def first_turn(model, pixel_values=None, rows=2, cache=None):
    """Run the first turn of a conversation, and return its ids, its mask and its cache. Each row has an image, and the
    second row is padded."""
    image = [IMAGE_ID] * model.image_seq_length
    ids = torch.tensor([[1, 10, *image, 20], [0, 1, *image, 30]][:rows])
    mask = ids.ne(0).long()
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    instruction = {} if model.qformer is None else {"qformer_input_ids": torch.tensor([[5, 6]] * rows)}
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixel_values[:rows],
            past_key_values=cache,
            use_cache=True,
            **instruction,
        )
    return ids, mask, cache


SECOND = torch.tensor([[22, 23, 24], [32, 33, 34]])
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("form", ["all tokens", "new tokens"])
@pytest.mark.parametrize("language", ["llama", "gpt2", "qwen3", "gemma"])
def test_a_second_turn_goes_on_from_the_cache_without_the_first_one_s_images(language, form, adapted):
    model = build(language=language)
    if adapted:
        model = get_peft_model(model, CromeConfig(bottleneck_dim=4, init_weights=False)).eval()
    host = model.get_base_model() if adapted else model
    pixels = torch.randn(2, 3, 30, 30)
    ids, mask, cache = first_turn(host, pixels)
    whole = torch.cat([ids, SECOND], dim=1)
    mask = torch.cat([mask, torch.ones_like(SECOND)], dim=1)
    expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=pixels, **GREEDY)
    given = whole if form == "all tokens" else SECOND
    found = model.generate(input_ids=given, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found[:, : given.shape[1]], given)
    assert torch.equal(found, expected[:, -found.shape[1] :])


@pytest.mark.parametrize("form", ["all tokens", "new tokens", "all tokens and images"])
@pytest.mark.parametrize("with_reader", [False, True])
def test_a_second_turn_brings_its_own_image(with_reader, form):
    model = with_qformer() if with_reader else build()
    pixels = torch.randn(4, 3, 30, 30)
    ids, mask, cache = first_turn(model, pixels[[0, 2]])
    new = torch.tensor(
        [[22, *[IMAGE_ID] * model.image_seq_length, 23], [32, *[IMAGE_ID] * model.image_seq_length, 33]]
    )
    whole, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
    read = {"qformer_input_ids": torch.tensor([[5, 6], [7, 8], [5, 6], [7, 8]])} if with_reader else {}
    expected = model.generate(input_ids=whole, attention_mask=mask, pixel_values=pixels, **read, **GREEDY)
    given = new if form == "new tokens" else whole
    images = {"pixel_values": pixels} | read
    if form != "all tokens and images":
        images = {name: value[[1, 3]] for name, value in images.items()}
    found = model.generate(input_ids=given, attention_mask=mask, past_key_values=cache, **images, **GREEDY)
    assert torch.equal(found, expected[:, -found.shape[1] :])


def test_a_cache_goes_on_without_a_mask_in_a_static_one_and_in_a_dictionary_of_outputs():
    model = build()
    pixels = torch.randn(1, 3, 30, 30)
    ids, _, cache = first_turn(model, pixels, rows=1)
    whole = torch.cat([ids, SECOND[:1]], dim=1)
    expected = model.generate(input_ids=whole, pixel_values=pixels, **GREEDY)
    found = model.generate(input_ids=SECOND[:1], past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(found.sequences, expected[:, -found.sequences.shape[1] :])
    _, _, static = first_turn(model, pixels, rows=1, cache=StaticCache(model.config.text_config, max_cache_len=64))
    assert torch.equal(model.generate(input_ids=whole, past_key_values=static, **GREEDY), expected)
    _, _, cache = first_turn(model, pixels, rows=1)
    turns = model.generate(input_ids=SECOND[:1], past_key_values=cache, **GREEDY)  # and a third turn after the second
    third = torch.cat([ids, turns, SECOND[1:]], dim=1)
    again = model.generate(input_ids=third, past_key_values=cache, **GREEDY)
    assert torch.equal(again, model.generate(input_ids=third, pixel_values=pixels, **GREEDY))


@pytest.mark.parametrize("language", ["llama", "gpt2"])
def test_forward_goes_on_from_a_cache_as_if_it_had_read_all(language):
    model = build(language=language)
    pixels = torch.randn(2, 3, 30, 30)
    ids, mask, cache = first_turn(model, pixels)
    whole = torch.cat([ids, SECOND], dim=1)
    mask = torch.cat([mask, torch.ones_like(SECOND)], dim=1)
    with torch.no_grad():
        expected = model(input_ids=whole, attention_mask=mask, pixel_values=pixels).logits[:, -3:]
        found = model(input_ids=SECOND, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected)


def test_a_cache_that_does_not_fit_the_mask_is_refused():
    model = build()
    ids, mask, cache = first_turn(model, torch.randn(2, 3, 30, 30))
    message = rf"hold {ids.shape[1]} tokens, input_ids have 3 and attention_mask counts 3"
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=SECOND, attention_mask=torch.ones_like(SECOND), past_key_values=cache, **GREEDY)
    both = torch.cat([ids, SECOND], dim=1)
    pixels = torch.randn(1, 3, 30, 30)
    with pytest.raises(ValueError, match="0 image tokens"):
        model.generate(
            input_ids=both,
            attention_mask=torch.cat([mask, torch.ones_like(SECOND)], dim=1),
            pixel_values=pixels,
            past_key_values=cache,
        )
