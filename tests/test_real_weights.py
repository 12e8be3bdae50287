"""Test the claims of the README on real weights. The models are SmolLM2-135M and DINOv2-small, in bf16, 8-bit and
4-bit."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from examples.easy_vqa import data
from examples.easy_vqa.model import PROJECTION, processor, vision_features
from examples.easy_vqa.parts import dinov2_small, smollm2
from examples.easy_vqa.training import answer_loss
from peft_crome import CromeConfig, CromeVLMForConditionalGeneration

pytestmark = pytest.mark.slow

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)


def backbone(quantization_config=None):
    torch.manual_seed(0)
    return CromeVLMForConditionalGeneration.from_backbones(
        vision=str(dinov2_small()),
        language=str(smollm2()),
        quantization_config=quantization_config,
        dtype=torch.bfloat16,
        vision_pool_size=2,
    )


@pytest.fixture(scope="module")
def batches():
    shared = processor()
    rows = data.tokenized(data.question_rows(data.load_questions("train"), 12, 0, 2), shared)
    collate = data.Collator(vision_features("train", shared.image_processor), 2)
    return [collate([rows[i] for i in range(first, first + 4)]) for first in (0, 4, 8)]


def forward(model, batch):
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    return answer_loss(outputs, batch["labels"]), outputs.logits


def train(model, batches, learning_rate=1e-3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    model.train()
    for batch in batches:
        loss = forward(model, batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantization_config", [None, NF4, INT8], ids=["bf16", "nf4", "int8"])
def test_adapter_on_real_backbone_trains_and_reloads_equal(quantization_config, batches, tmp_path):
    base = backbone(quantization_config).requires_grad_(False).eval()
    with torch.no_grad():
        expected = forward(base, batches[0])[1]
        torch.testing.assert_close(
            forward(get_peft_model(base, CromeConfig()), batches[0])[1], expected, rtol=0, atol=0
        )

    # A new model: on CPUs with AVX512-BF16, bitsandbytes 0.50.2 packs 4-bit weights at the first evaluation, which
    # rounds their scales.
    base = backbone(quantization_config)
    base.save_pretrained(tmp_path / "composite")
    model = get_peft_model(base, CromeConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 576 * 424

    losses = train(model, batches + batches)
    assert losses[-1] < losses[0]
    changed = get_peft_model_state_dict(model)
    assert all("crome_" in key for key in changed)
    assert changed["base_model.model.crome.crome_up.weight"].abs().max() > 0
    model.eval()
    with torch.no_grad():
        trained = forward(model, batches[0])[1]
    model.save_pretrained(tmp_path / "adapter")

    fresh = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite")
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(reloaded, batches[0])[1], trained, rtol=0, atol=0)


def test_kbit_preparation_changes_nothing_about_what_trains(batches):
    plain = get_peft_model(backbone(NF4), CromeConfig())
    prepared = get_peft_model(prepare_model_for_kbit_training(backbone(NF4)), CromeConfig())
    names = [sorted(n for n, p in model.named_parameters() if p.requires_grad) for model in (plain, prepared)]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    for model in (plain, prepared):
        train(model, batches[:2])
        for name, parameter in model.named_parameters():
            if name.endswith("crome_up.default.weight"):
                assert parameter.abs().max() > 0


def test_projection_trains_beside_the_adapter_and_is_saved(batches, tmp_path):
    model = get_peft_model(backbone(), CromeConfig(modules_to_save=[PROJECTION]))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 3 + 2
    train(model, batches)
    after = dict(model.named_parameters())
    still = [
        n for n, p in before.items() if torch.equal(p, after[n]) and "crome_gate" not in n and "crome_down" not in n
    ]
    assert not still
    model.eval()
    with torch.no_grad():
        trained = forward(model, batches[0])[1]
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    reloaded = PeftModel.from_pretrained(backbone(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(reloaded, batches[0])[1], trained, rtol=0, atol=0)


def test_folding_the_text_branch_keeps_generation_equal_on_real_weights(batches):
    model = get_peft_model(backbone(), CromeConfig(branches=["text", "vision"]))
    train(model, batches)
    model.eval()
    prompt = {"input_ids": torch.tensor([[1, 4093, 198, 504, 3575, 282]])}
    unfolded = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = forward(model, batches[0])[1]
    model.merge_adapter()
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), unfolded)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, batches[0])[1], logits, rtol=0, atol=0)
    model.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(forward(model, batches[0])[1], logits, rtol=0, atol=0)


@pytest.mark.parametrize("quantization_config", [None, NF4, INT8], ids=["bf16", "nf4", "int8"])
def test_words_alone_are_answered_by_the_language_model_as_it_was(quantization_config, batches):
    prompt = {"input_ids": torch.tensor([[1, 4093, 198, 504, 3575, 282]])}
    model = get_peft_model(backbone(quantization_config), CromeConfig())
    train(model, batches)
    model.eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**prompt, **settings)
    with model.disable_adapter():
        expected = model.generate(**prompt, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for step, base in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, base, rtol=0, atol=0)
