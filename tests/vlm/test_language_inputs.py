"""Test language models that need more than embeddings, or whose `generate` does not declare that it
takes embeddings."""

import copy

import pytest
import torch
from peft import get_peft_model

from peft_crome import CromeConfig
from peft_crome.serving import ImageEncoder
from tests.language_zoo.test_language_zoo import PROMPT, composite, language_model

LOOK_UP = ("gemma3n_text", "gemma4_text", "qwen4_exp_text")


@pytest.mark.parametrize("method", ["__call__", "generate"])
@pytest.mark.parametrize("name", LOOK_UP)
def test_embeddings_alone_lack_what_layers_look_up(name: str, method: str) -> None:
    joined, batch = composite(language_model(name, False))
    _, inputs_embeds, _ = joined.embed_inputs(batch["input_ids"], batch["pixel_values"])
    with pytest.raises(ValueError, match=r"got inputs_embeds alone\. Pass input_ids and pixel_values, or p"):
        getattr(joined, method)(inputs_embeds=inputs_embeds)


@pytest.mark.parametrize("name", LOOK_UP)
def test_embeddings_beside_what_layers_look_up(name: str) -> None:
    joined, batch = composite(language_model(name, False))
    expected = joined(**batch).logits
    ids, inputs_embeds, _ = joined.embed_inputs(batch["input_ids"], batch["pixel_values"])
    given = {"ple_input_ids": ids}
    if name != "qwen4_exp_text":
        look_up = joined.language_model.get_decoder().get_per_layer_inputs
        given = {"per_layer_inputs": look_up(ids) if name == "gemma3n_text" else look_up(ids, None)}
    torch.testing.assert_close(joined(inputs_embeds=inputs_embeds, **given).logits, expected)


@pytest.mark.parametrize("name", ["gemma4_text", "bamba", "nemotron_h"])
def test_beams_of_a_row_do_not_depend_on_the_other_rows(name: str) -> None:
    joined, batch = composite(language_model(name, False))
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = joined.generate(**batch, **settings)
    first = joined.generate(**{key: value[:1] for key, value in batch.items()}, **settings)
    assert torch.equal(together[:1, : first.shape[1]], first)


def test_the_language_model_itself_stays_as_it_is() -> None:
    joined, batch = composite(language_model("falcon_h1", False))
    own, attributes = type(joined.language_model), copy.copy(joined.language_model.__dict__)
    written = joined.generate(**batch, max_new_tokens=2, do_sample=False)
    assert written.shape[1] > PROMPT.shape[1]
    assert type(joined.language_model) is own
    assert joined.language_model.__dict__.keys() == attributes.keys()


def test_whole_prompts_for_an_engine_are_refused() -> None:
    joined, batch = composite(language_model("gemma4_text", False))
    encoder = ImageEncoder(get_peft_model(joined, CromeConfig(bottleneck_dim=4)))
    assert len(encoder(**batch)) == 2
    with pytest.raises(ValueError, match="looks up more than one embedding by token id, and got inputs_embeds alone"):
        encoder.prompt_embeds(**batch)
