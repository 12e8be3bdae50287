"""Test the memory and operations that are predicted for a step without weights. They are compared with real tiny
models and with counts by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_crome.training import (
    NotPredictable,
    StepSize,
    build,
    load_recipe,
    model_skeleton,
    predict_step,
    recipe_skeleton,
)
from peft_crome.training.model.packed import pack
from peft_crome.training.model.skeleton import composite_config, quantization_of
from tests.vlm.tiny import text_config


def real_batch(composite: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Build the batch that `StepSize(rows, tokens, images=rows)` describes, with one image in each row."""
    ids = torch.full((rows, tokens), 5)
    ids[:, 1 : 1 + composite.image_seq_length] = composite.config.image_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 50}
    batch["attention_mask"][-1, -1] = 0  # padding, so that there is a mask as in most batches
    batch["pixel_values"] = torch.randn(rows, 3, *composite.config.image_height_width)
    batch["qformer_input_ids"] = torch.full((rows, 4), 5)
    return {**batch, "qformer_attention_mask": torch.ones_like(batch["qformer_input_ids"])}


def described(tensors: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(value.shape), value.dtype, value.requires_grad) for name, value in tensors}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_skeleton_is_the_model_that_is_built(dtype: str, stage: str, values: dict[str, Any]) -> None:
    """A skeleton has the parameters of the built model, with equal names, shapes and dtypes, but no values. The same
    parameters train."""
    values["backbones"]["dtype"] = dtype
    recipe = load_recipe({**values, "stage": stage})
    shape = recipe_skeleton(recipe)
    assert all(tensor.is_meta for tensor in [*shape.parameters(), *shape.buffers()])
    assert described(shape.named_parameters()) == described(build(recipe)[0].named_parameters())


@pytest.mark.parametrize(
    ("part", "key"), [("language_model", "quantization"), ("vision_tower", "vision_quantization")]
)
def test_packed_in_another_way_names_the_key(part: str, key: str, values: dict[str, Any]) -> None:
    recipe = load_recipe(values)
    assert recipe.backbones is not None
    config = composite_config(recipe.backbones)
    own = config.text_config if part == "language_model" else config.vision_config
    own.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=rf"The {part} is quantized with 'gptq'.* with {key}: 4bit"):
        quantization_of(config, part)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_packed_weights_have_the_size_of_bitsandbytes(quantization: str, values: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    values["backbones"] |= {"quantization": quantization, "vision_quantization": quantization, "dtype": "bfloat16"}
    recipe = load_recipe(values)
    composite = build(recipe)[0].get_base_model()
    predicted = predict_step(recipe_skeleton(recipe), StepSize(1, 16, images=1)).weights
    for part in ("language_model", "vision_tower"):
        module = getattr(composite, part)
        tensors = [*module.parameters(), *module.buffers()]
        for parameter in module.parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            scales = getattr(parameter, "SCB", None)
            tensors += [] if scales is None else [scales]
        measured = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        assert predicted[part] == pytest.approx(measured, rel=0.01)


def test_what_is_kept_is_what_autograd_saves(values: dict[str, Any]) -> None:
    recipe = load_recipe({**values, "stage": "pretrain"})
    model = build(recipe)[0]
    composite = model.get_base_model()
    model.train()
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows, tokens = 8, 64
    batch = real_batch(composite, rows, tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    size = StepSize(rows, tokens, images=rows, instruction_tokens=4)
    kept = predict_step(recipe_skeleton(recipe), size).kept
    assert kept == pytest.approx(sum(saved.values()), rel=0.05)


def test_operations_are_those_counted_by_hand(tmp_path: Path) -> None:
    """The predicted operations equal a count by hand. A frozen layer takes one product forward and one backward to its
    input. The adapter takes one more for each of its weights."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    config.save_pretrained(tmp_path)
    model = model_skeleton(str(tmp_path), "float32", None)
    rows, tokens = 3, 40
    cost = predict_step(model, StepSize(rows, tokens, images=0))
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 300
    bottleneck = 64 * 424
    products = 2 * linear + 3 * bottleneck + 3 * bottleneck + 1 * bottleneck
    # W_d, W_g, W_u forward, three gradients of them, and W_u's input; the token table takes no gradient.
    attention = 2 * (2 + 5) * 2 * rows * 4 * tokens * tokens * 16
    assert cost.flops == pytest.approx(2 * products * rows * tokens + attention, rel=0.01)
    assert cost.gradients == 3 * bottleneck * 4
    assert cost.optimizer == 2 * cost.gradients
    assert cost.weights["adapter"] == 3 * bottleneck * 4
    assert cost.weights["lm_head"] == 64 * 300 * 4


def test_settings_move_the_memory_as_they_should(values: dict[str, Any]) -> None:
    model = recipe_skeleton(load_recipe(values))
    small, large = (predict_step(model, StepSize(rows, 64, images=rows)) for rows in (2, 8))
    assert large.kept == pytest.approx(4 * small.kept, rel=0.05)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.01)
    assert large.weights == small.weights
    assert large.peak >= sum(large.weights.values()) + large.optimizer + large.gradients
    assert large.activations == large.peak - sum(large.weights.values()) - large.optimizer
    again = predict_step(model, StepSize(8, 64, images=8), accumulate=True)
    assert 0 <= again.peak - large.peak <= large.gradients
    checkpointed = predict_step(model, StepSize(8, 64, images=8), gradient_checkpointing=True)
    assert checkpointed.kept < large.kept
    assert checkpointed.flops > large.flops
    assert all(parameter.is_meta for parameter in model.parameters())


def test_step_that_looks_at_values_is_not_predicted(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
    ).save_pretrained(tmp_path)
    model = model_skeleton(str(tmp_path), "float32", None)

    class Routed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    model.get_base_model().model.norm = Routed()
    with pytest.raises(NotPredictable, match=r"PeftModel.* cannot be rehearsed without values"):
        predict_step(model, StepSize(1, 8, images=0))


def test_tied_weights_count_once(tmp_path: Path) -> None:
    found = []
    for tied in (True, False):
        config = text_config("llama")
        config.tie_word_embeddings = tied
        config.save_pretrained(tmp_path)
        weights = predict_step(model_skeleton(str(tmp_path), "float32", None), StepSize(1, 8, images=0)).weights
        found.append(sum(weights.values()))
    assert found[1] - found[0] == 100 * 32 * 4


def test_what_transformers_would_not_quantize_stays() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config("llama"))
        gpt = AutoModelForCausalLM.from_config(text_config("gpt2"))  # its linear maps are transposed
    pack(model, "4bit")
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == ["lm_head"]
    pack(gpt, "8bit")
    layer = gpt.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)


def test_eight_bits_keep_their_inputs(tmp_path: Path) -> None:
    """8-bit layers keep their inputs for the backward pass, as in LLM.int8. 4-bit layers keep none."""
    text_config("llama").save_pretrained(tmp_path)
    size = StepSize(3, 24, images=0)
    plain, four, eight = (
        predict_step(model_skeleton(str(tmp_path), "bfloat16", quantization), size).kept
        for quantization in (None, "4bit", "8bit")  # type: ignore[arg-type]
    )
    assert four == pytest.approx(plain, rel=0.02)
    assert eight > 1.04 * four


def test_encoder_decoder_and_mixed_precision(seq2seq_backbone: str, values: dict[str, Any]) -> None:
    values["backbones"] |= {"language": seq2seq_backbone, "qformer_tokenizer": seq2seq_backbone}
    model, size = recipe_skeleton(load_recipe(values)), StepSize(2, 24, images=2)
    plain, mixed = (predict_step(model, size, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert plain.peak > sum(plain.weights.values())
    assert mixed.weights == plain.weights
    assert mixed.peak != plain.peak
