"""Generation is the language model's own, over text and images."""

import pytest
import torch
from transformers import GenerationConfig

from tests.vlm.conftest import IMAGE_ID, LANGUAGE_MODELS, SEQ2SEQ, build, make_batch


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


def test_guessing_ahead_is_refused():
    model = build()
    batch = make_batch(model, images_per_row=(1,))
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model.language_model}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} does not work here"):
            model.generate(**batch, max_new_tokens=3, **options)
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
