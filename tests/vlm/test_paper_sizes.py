"""Test the paper's system at its real size on the meta device. Its weights per part and per stage equal those in
the docs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from peft_crome import CromeConfig
from peft_crome.training import STAGES
from peft_crome.vlm import CromeVLMConfig, CromeVLMForConditionalGeneration

PAGE = Path(__file__).parents[2] / "docs" / "composite.md"
LANGUAGE_MODELS: dict[str, Any] = {
    "Vicuna-7B": tf.LlamaConfig(),
    "Vicuna-13B": tf.LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "Flan-T5-XXL": tf.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
}  # fmt: skip


def counts(language: str) -> dict[str, int]:
    """Return the number of weights of each part and of the default adapter. The tower is EVA ViT-g/14 at 224 px, with
    a Q-Former and the named language model."""
    config = CromeVLMConfig(
        vision_config=tf.InstructBlipVisionConfig(),
        text_config=LANGUAGE_MODELS[language],
        qformer_config=tf.InstructBlipQFormerConfig(),
    )
    with torch.device("meta"):
        model = CromeVLMForConditionalGeneration(config)
    parts = ("vision_tower", "qformer", "image_projection", "text_projection", "language_model")
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts}
    return sizes | {"adapter": get_peft_model(model, CromeConfig()).get_nb_trainable_parameters()[0]}


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_sizes_are_the_papers_and_the_docs(language: str) -> None:
    sizes = counts(language)
    width = 5120 if language == "Vicuna-13B" else 4096
    assert sizes["adapter"] == 5 * width * 256
    assert sizes["qformer"] + sizes["text_projection"] == pytest.approx(188e6, abs=2e6 if width == 5120 else 1e6)
    if language == "Vicuna-7B":
        reader = sizes["qformer"] + sizes["text_projection"]
        assert reader / sizes["vision_tower"] == pytest.approx(0.1915, abs=0.0005)  # "about 20%"
        assert reader / sizes["language_model"] == pytest.approx(0.028, abs=0.0005)  # "2.6%"
    assert set().union(*(stage.parts for stage in STAGES.values())) <= set(sizes)
    stages = [sum(sizes[part] for part in stage.parts) for stage in STAGES.values()]
    assert stages[-1] == sizes["adapter"]
    parts = ("vision_tower", "qformer", "image_projection", "text_projection", "language_model")
    row = [sizes[part] for part in parts]
    line = f"| {language} | {' | '.join(f'{number:,}' for number in [*row, *stages])} |"
    assert line in PAGE.read_text(encoding="utf-8"), line


@pytest.mark.parametrize("name", STAGES)
def test_stages_in_the_docs_are_those_of_the_package(name: str) -> None:
    page = (PAGE.parent / "stages.md").read_text(encoding="utf-8")
    stage = STAGES[name]
    before = ", ".join(f"`{previous}`" for previous in stage.previous) or "the backbones"
    assert f"| `{stage.name}` | {', '.join(stage.parts)} | {before} |" in page
