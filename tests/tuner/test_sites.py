"""Test how sites are found in unknown and unusual architectures, with aliases and with ranges of token ids."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import peft_crome
from peft_crome import CromeConfig
from peft_crome.tuner.branches import site_path, token_range, with_ranges
from peft_crome.tuner.sites.find import find_branches
from peft_crome.tuner.sites.rules import _ranges
from tests.tuner.helpers import M, assert_equal, attach, crome_weight, logits, randomize, unchanged
from tests.zoo import VOCABULARY, WIDTH

PLACEHOLDER = VOCABULARY - 1


class MadeUpConfig(tf.PretrainedConfig):  # of transformers 4 and 5
    model_type = "made_up_vl"
    sub_configs = {"vision_config": tf.CLIPVisionConfig, "text_config": tf.LlamaConfig}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        self.vision_config = tf.CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **sizes)
        self.text_config = tf.LlamaConfig(hidden_size=WIDTH, vocab_size=VOCABULARY, pad_token_id=0, **sizes)
        super().__init__(**kwargs)


class MadeUpModel(tf.PreTrainedModel):
    """Stand in for an architecture in no table. `name` is the attribute of its projector."""

    config_class = MadeUpConfig

    def __init__(self, name: str, projector: nn.Module) -> None:
        super().__init__(MadeUpConfig())
        self.seer = tf.CLIPVisionModel(self.config.vision_config)
        self.language_model = tf.LlamaForCausalLM(self.config.text_config)
        self.name = name
        setattr(self, name, projector)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> CausalLMOutput:
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = getattr(self, self.name)(self.seer(pixel_values).last_hidden_state[:, 1:])
            embeddings = embeddings.masked_scatter((input_ids == PLACEHOLDER)[..., None], seen)
        return self.language_model(inputs_embeds=embeddings)


BATCH = {
    "input_ids": torch.tensor([[1, *[PLACEHOLDER] * 4, 5]]),
    "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
}
USUAL = ("multi_modal_projector", "vision_projector", "connector", "mm_projector", "image_adapter", "embed_vision")


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_unknown_architecture_of_usual_shape_works(name: str, kind: str) -> None:
    layers = [nn.Linear(16, 24), nn.GELU(), nn.Linear(24, WIDTH)]
    base = MadeUpModel(name, nn.Linear(16, WIDTH) if kind == "linear" else nn.Sequential(*layers)).eval()
    model = attach(base)
    assert {row.site for row in peft_crome.check(model, BATCH)} == {
        "base_model.model.language_model.model.embed_tokens",
        f"base_model.model.{name}",
    }
    assert model.get_nb_trainable_parameters()[0] == 5 * WIDTH * M


def test_unusual_architecture_gets_the_line_to_write_and_it_works() -> None:
    base = MadeUpModel("kaleidoscope", nn.Linear(16, WIDTH)).eval()
    with unchanged(base), pytest.raises(ValueError, match="No vision site is known for MadeUpModel") as error:
        get_peft_model(base, CromeConfig())
    line = re.search(r"Write (CromeConfig\(branches=.*?\)),", str(error.value))
    assert line is not None
    config = eval(line.group(1), {"CromeConfig": CromeConfig})
    assert config.branches == {"vision": ["kaleidoscope"]}
    rows = peft_crome.check(get_peft_model(base, config), BATCH)
    assert all(row.gradient for row in rows)


def test_projection_of_another_width_is_no_site() -> None:
    base = MadeUpModel("projector", nn.Linear(16, 24))
    with pytest.raises(ValueError, match="No vision site is known"):
        get_peft_model(base, CromeConfig())


def test_audio_is_a_branch_of_its_own() -> None:
    base = MadeUpModel("multi_modal_projector", nn.Linear(16, WIDTH))
    base.audio_projector = nn.Linear(16, WIDTH)
    found = find_branches(base, None)
    assert found["vision"] == ["multi_modal_projector"]
    assert found["audio"] == ["audio_projector"]


def test_one_module_under_two_names_is_wrapped_under_both() -> None:
    """A module under two names is wrapped under both. After `resize_token_embeddings`, BART's encoder and decoder hold
    the very same module."""
    config = tf.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=2,
    )  # fmt: skip
    base = tf.BartForConditionalGeneration(config).eval()
    base.set_input_embeddings(base.get_input_embeddings())
    assert base.model.encoder.embed_tokens is base.model.decoder.embed_tokens
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[2, 6]])}
    expected = logits(base.requires_grad_(False), batch)
    model = attach(base, branches={"text": ["model.shared"]})
    assert base.model.encoder.embed_tokens is base.model.decoder.embed_tokens is base.model.shared
    assert_equal(logits(model.eval(), batch), expected)
    randomize(model)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-4)
    model.unload()
    assert isinstance(base.model.encoder.embed_tokens, nn.Embedding)
    assert base.model.encoder.embed_tokens is base.model.decoder.embed_tokens is base.model.shared
    assert_equal(logits(base, batch), expected)


# ---- ranges of token ids ----


@pytest.mark.parametrize(
    ("ids", "ranges"), [([4, 5, 6], [(4, 7)]), ([9, 4, 5, 7], [(4, 6), (7, 8), (9, 10)]), ([3], [(3, 4)])]
)
def test_ranges_hold_exactly_the_ids(ids: list[int], ranges: list[tuple[int, int]]) -> None:
    assert list(_ranges(ids)) == ranges


def test_site_names_carry_their_range() -> None:
    assert site_path("a.b[4:9]") == "a.b"
    assert token_range("a.b[4:9]") == [(4, 9)]
    assert site_path("a.b") == "a.b"
    assert token_range("a.b") == []
    assert with_ranges("a.b", [(4, 9), (11, 12)]) == ["a.b[4:9]", "a.b[11:12]"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=WIDTH, vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    ).eval()


IMAGE_IDS = {"text": ["embed_tokens"], "vision": ["embed_tokens[40:60]"]}


def test_branch_can_be_a_range_of_token_ids() -> None:
    model = attach(llama(), branches=IMAGE_IDS).eval()
    randomize(model)
    embed, weights = model.base_model.model.model.embed_tokens, model.base_model.model.crome
    ids = torch.tensor([[1, 39, 40, 59, 60]])
    with torch.no_grad():
        x = embed.base_layer(ids)
        text, vision = (x + weights(x, branch, "default") for branch in ("text", "vision"))
        expected = torch.where(torch.tensor([False, False, True, True, False])[:, None], vision, text)
        assert_equal(embed(ids), expected)
        assert_equal(embed(input=ids), expected)


def test_ranges_fold_into_the_table() -> None:
    model = attach(llama(), branches=IMAGE_IDS).eval()
    randomize(model)
    batch = {"input_ids": torch.tensor([[1, 39, 40, 59, 60]])}
    expected = logits(model, batch)
    with torch.no_grad():
        rows = model.base_model.model.model.embed_tokens(torch.arange(VOCABULARY))
    merged = model.merge_and_unload()
    assert_equal(merged.model.embed_tokens.weight.detach(), rows)
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-4)


def test_branch_without_image_tokens_in_the_batch_is_untouched() -> None:
    model = attach(llama(), branches=IMAGE_IDS).eval()
    randomize(model)
    batch = {"input_ids": torch.tensor([[1, 5, 6]])}
    expected = logits(model, batch)
    with torch.no_grad():
        crome_weight(model, "down_vision").normal_()
    assert_equal(logits(model, batch), expected)


@pytest.mark.parametrize(
    "branches",
    [
        {"text": ["embed_tokens[0:41]"], "vision": ["embed_tokens[40:60]"]},
        {"text": ["embed_tokens"], "vision": ["embed_tokens"]},
        {"text": ["embed_tokens[40:60]"], "vision": ["embed_tokens[40:60]"]},
    ],
)
def test_overlapping_branches_are_refused(branches: dict[str, list[str]]) -> None:
    base = llama()
    with unchanged(base), pytest.raises(ValueError, match="adapted twice"):
        get_peft_model(base, CromeConfig(branches=branches))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_head_with_lora_that_shares_the_table_is_no_site() -> None:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, **sizes))
    model.lm_head.weight = model.get_input_embeddings().weight
    get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    assert find_branches(model, ["text"]) == {"text": ["model.embed_tokens"]}
