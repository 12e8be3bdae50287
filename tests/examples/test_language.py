"""Test what the language model keeps: its loss on text alone, and the cells of a table that show it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from examples.easy_vqa import language
from peft_crome import CromeConfig
from tests.vlm.tiny import build, make_tokenizer

BRANCHES = {"vision": {"vision": ["vision_fusion"]}, "text": {"text": ["embed_tokens"]}}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a processor with a tiny tokenizer and chat template. The English text becomes 1,200 of its words."""
    words = [f"w{number * 7 % 90}" for number in range(1200)]
    monkeypatch.setattr(language, "english_text", lambda: " ".join(words))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "user: {{ messages[0]['content'] }} assistant: "
    return SimpleNamespace(tokenizer=tokenizer)


@pytest.mark.parametrize("branch", BRANCHES)
def test_text_meets_an_adapter_on_words_alone(branch: str, processor: SimpleNamespace) -> None:
    config = CromeConfig(branches=copy.deepcopy(BRANCHES[branch]), bottleneck_dim=8, init_weights=False)
    model = get_peft_model(build(), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "crome_" in name:
                weight.mul_(10)
    kept = language.language_kept(model, processor)
    loss = kept["text_loss"]
    assert loss["tokens"] > 1000
    if branch == "vision":
        assert loss["adapted"] == loss["base"]
        assert loss["cost"] == 0
        assert kept["answer"] == kept["base_answer"]
    else:
        assert loss["cost"] != 0
    again = language.language_kept(build(), processor)
    assert again["text_loss"]["adapted"] == pytest.approx(loss["base"])
    assert again["answer"] == kept["base_answer"]


def kept(adapted: float, base: float, answer: str) -> dict[str, object]:
    loss = {"adapted": adapted, "base": base, "cost": adapted - base, "cost_stderr": 0.004}
    return {"text_loss": loss, "answer": answer}


def test_columns_show_one_seeds_error_and_the_range_of_several() -> None:
    assert language.columns([]) == ["-", "-", "-"]
    one = kept(4.0, 3.5, "4")
    assert language.columns([one]) == ["4.000 (+0.500 ± 0.004)", "3.500", '"4"']
    several = [one, kept(4.2, 3.5, "Paris."), kept(4.1, 3.5, "4")]
    assert language.columns(several) == ["4.100 (+0.500 to +0.700)", "3.500", '"4", "Paris."']
    same = [kept(3.5, 3.5, "Paris.")] * 3
    assert language.columns(same) == ["3.500 (+0.000 to +0.000)", "3.500", '"Paris."']
