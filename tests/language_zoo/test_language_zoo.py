"""Test every language model in the composite: logits, the exact start, gradients, text, generation and folding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Dinov2Config, PreTrainedModel

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from peft_crome.serving import fold
from peft_crome.vlm.language_head import scaled
from tests.language_zoo.small import VOCABULARY, architectures, small_config
from tests.tuner.helpers import untying_changes

IMAGE = VOCABULARY
PROMPT = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8], [5, *[IMAGE] * 4, 7, 8, 9]])
TEXT = PROMPT.masked_fill(PROMPT == IMAGE, 20)
NEW_TOKENS = 5

REFUSED = {
    "cpmant": "takes token ids alone, no inputs_embeds",
    "deepseek_v4": "chooses experts by token id",
    "fsmt": "masks its decoder's future only where it gets token ids",
}
NO_GENERATE = {"openai-gpt", "reformer", "xlm", "xlnet"}
NO_FOLD = {
    "inkling_text": "does more than look rows up",
    "inkling2_text": "does more than look rows up",
    "seamless_m4t": "share one table and scale its rows differently",
    "seamless_m4t_v2": "share one table and scale its rows differently",
}
OTHER_POSITIONS = {  # count from the pad id on in forward, and from 0 in generate, which the composite follows
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
MORE_THAN_A_HEAD = {  # between the last hidden states and the logits
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "inkling_text", "megatron-bert",
    "modernbert-decoder", "prophetnet", "recurrent_gemma", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
NOT_THE_SAME_CACHED = {("prophetnet", False), ("prophetnet", True), ("rwkv", False)}  # nor by themselves
QUICK = {"llama", "qwen3", "gemma4_text", "gemma3n_text", "falcon_h1", "t5"}

each_language_model = pytest.mark.parametrize(
    ("name", "seq2seq"),
    [
        pytest.param(
            name, seq2seq, id=f"{name}{'-seq2seq' * seq2seq}", marks=[] if name in QUICK else pytest.mark.slow
        )
        for name, seq2seq in architectures()
    ],
)


def language_model(name: str, seq2seq: bool) -> PreTrainedModel:
    """Build a random language model. None of its weights has a neutral value that would hide what it multiplies."""
    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto_class.from_config(small_config(name, seq2seq)).eval()
    model.generation_config.forced_eos_token_id = None  # BART's, at the last place
    model.generation_config.encoder_no_repeat_ngram_size = None  # Blenderbot's: it needs the encoder's ids
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # Marian's positions, which no checkpoint has
                continue
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def composite(model: PreTrainedModel) -> tuple[CromeVLMForConditionalGeneration, dict[str, Any]]:
    """Join the language model to a tiny tower, and return the composite with a batch that has an image in each row."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    tower = AutoModel.from_config(Dinov2Config(hidden_size=16, **sizes))
    joined = CromeVLMForConditionalGeneration.from_backbones(tower, model, image_token_id=IMAGE).eval()
    with torch.no_grad():
        joined.image_projection.weight.normal_(std=0.2)
    mask = torch.ones_like(PROMPT)
    return joined, {"input_ids": PROMPT, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 28, 28)}


def targets(joined: CromeVLMForConditionalGeneration, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return labels for `ids`."""
    return {"labels": torch.tensor([[9, 10, 2], [11, 12, 2]]) if joined.config.is_encoder_decoder else ids}


@each_language_model
def test_language_model(name: str, seq2seq: bool, tmp_path: Path) -> None:
    model = language_model(name, seq2seq)
    alone = copy.deepcopy(model)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            composite(model)
        return
    joined, batch = composite(model)

    text = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), **targets(joined, TEXT)}
    with torch.no_grad():
        if name not in OTHER_POSITIONS:
            torch.testing.assert_close(joined(**text).logits, alone(**text).logits, rtol=1e-4, atol=1e-4)
        expected = joined(**batch, **targets(joined, PROMPT)).logits
        words = joined.requires_grad_(False)(**text).logits
        adapted = get_peft_model(joined, CromeConfig(bottleneck_dim=8, init_weights=False))
        assert torch.equal(adapted(**text).logits, words)  # by default text is the language model's own
        assert not torch.equal(adapted(**batch, **targets(joined, PROMPT)).logits, expected)
        adapted = get_peft_model(adapted.unload(), CromeConfig(branches=["text", "vision"], bottleneck_dim=8))
        assert torch.equal(adapted(**batch, **targets(joined, PROMPT)).logits, expected)

    for parameter_name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
            assert "crome_" in parameter_name
    adapted.train()(**batch, **targets(joined, PROMPT)).loss.backward()
    for parameter_name, parameter in adapted.eval().named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), parameter_name

    check_base_model(joined, name, batch)
    check_generation(adapted, name, batch)
    check_fold(adapted, name, {**batch, **targets(joined, PROMPT)}, text, tmp_path / "folded")


@torch.no_grad()
def check_base_model(joined: CromeVLMForConditionalGeneration, name: str, batch: dict[str, Any]) -> None:
    """Assert that the head alone gives the logits, with the scale and cap that TRL reads from the configuration. Other
    models must raise an error."""
    if joined.config.is_encoder_decoder or name in MORE_THAN_A_HEAD:
        more = "no decoder that reads" if joined.config.is_encoder_decoder else "does more than its head"
        with pytest.raises(ValueError, match=more):
            joined.model(**batch)
        return
    found = scaled(joined.config.get_text_config(), joined.get_output_embeddings()(joined.model(**batch)[0]))
    torch.testing.assert_close(found, joined(**batch).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_generation(adapted: PeftModel, name: str, batch: dict[str, Any]) -> None:
    """Assert that each generated token has the highest logit when the text so far goes through `forward` at once."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if name in NO_GENERATE:
        with pytest.raises(ValueError, match=r"generate takes token ids alone in transformers"):
            adapted.generate(**batch, **settings)
        return
    written = adapted.generate(**batch, **settings)
    seq2seq = adapted.config.is_encoder_decoder
    if (name, seq2seq) in NOT_THE_SAME_CACHED:
        return
    if seq2seq:
        new, logits = written[:, 1:], adapted(**batch, decoder_input_ids=written[:, :-1]).logits
    else:
        new = written[:, PROMPT.shape[1] :]
        again = {"input_ids": written, "attention_mask": torch.ones_like(written)}
        logits = adapted(**{**batch, **again}).logits[:, PROMPT.shape[1] - 1 : -1]
    ended = (new == 2).cumsum(dim=1) - (new == 2).long() > 0
    behind = logits.max(dim=-1).values - logits.gather(-1, new[..., None])[..., 0]
    assert behind.masked_fill(ended, 0).max() < 1e-3


@torch.no_grad()
def check_fold(adapted: PeftModel, name: str, batch: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    """Assert that the folded text branch gives the same logits, also from a checkpoint. Otherwise folding is refused,
    and nothing changes."""
    expected = adapted(**batch).logits
    because = "scales its output" if untying_changes(adapted, batch) else NO_FOLD.get(name)
    if because:
        with pytest.raises(ValueError, match=because):
            adapted.merge_adapter()
    else:
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        adapted.unmerge_adapter()
        words = adapted(**text).logits
        fold(adapted, folder)
        language_model = adapted.get_base_model().language_model
        written, found = type(language_model).from_pretrained(folder, output_loading_info=True)
        assert not found["missing_keys"]
        if name not in OTHER_POSITIONS:
            torch.testing.assert_close(written.eval()(**text).logits, words, rtol=1e-4, atol=1e-4)
    assert torch.equal(adapted(**batch).logits, expected)


def test_docs_list_them() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "composite.md").read_text()
    listed = page.split("<!-- language models -->")[1].split("<!-- end of language models -->")[0]
    all_of_them = {name for name, _ in architectures()}
    works = sorted(all_of_them - REFUSED.keys() - NO_GENERATE)
    assert listed.strip() == ", ".join(f"`{name}`" for name in works)
    assert f"{len(works)} of the {len(all_of_them)} architectures" in page
    assert f"{len(works)} of {len(all_of_them)}" in (root / "README.md").read_text()
    conformity = " ".join((root / "docs" / "conformity.md").read_text().split())
    assert f"language model](composite.md) of the composite but {len(MORE_THAN_A_HEAD)}," in conformity
