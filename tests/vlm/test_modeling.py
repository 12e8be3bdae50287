"""Test the composite against LLaVA and against its own language model, with rows, padding and training."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaConfig, Trainer, TrainingArguments

from tests.vlm.tiny import IMAGE_ID, LANGUAGE_MODELS, SEQ2SEQ, build, make_batch, text_config, vision_config


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_logits_equal_llava_of_the_same_parts(layer, strategy):
    model = build(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_index=99,
        projector_hidden_act="linear",
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    llava = AutoModelForImageTextToText.from_config(config).eval()
    llava.model.vision_tower.load_state_dict(model.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(model.language_model.model.state_dict())
    llava.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
    projector = llava.model.multi_modal_projector
    projector.linear_1.load_state_dict(model.image_projection.state_dict())
    projector.linear_2.weight.data.copy_(torch.eye(32))
    projector.linear_2.bias.data.zero_()
    model.config.image_token_id = 99
    batch = make_batch(model, side="right")
    batch["input_ids"][batch["input_ids"] == IMAGE_ID] = 99
    labels = (
        batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).masked_fill(batch["input_ids"] == 99, -100)
    )
    expected, found = llava(**batch, labels=labels), model(**batch, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it itself
def test_compiled_parts_join_as_they_are():
    model = build()
    batch = make_batch(model)
    compiled = [torch.compile(part, backend="eager") for part in (model.vision_tower, model.language_model)]
    joined = type(model)(model.config, vision_tower=compiled[0], language_model=compiled[1]).eval()
    joined.image_projection.load_state_dict(model.image_projection.state_dict())
    assert (joined.vision_tower, joined.language_model) == tuple(compiled)
    torch.testing.assert_close(joined(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_text_alone_equals_the_language_model(language):
    model = build(language=language)
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 3]])
    extra = {"labels": torch.tensor([[5, 6], [7, 8]])} if language in SEQ2SEQ else {}
    expected = model.language_model(input_ids=ids, **extra).logits
    torch.testing.assert_close(model(input_ids=ids, **extra).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_padding_side_and_company_make_no_difference(language):
    model = build(language=language)
    left, right = make_batch(model, side="left"), make_batch(model, side="right")
    extra = {"decoder_input_ids": torch.tensor([[0, 5, 6]] * 3)} if language in SEQ2SEQ else {}
    outputs = [model(**batch, **extra).logits for batch in (left, right)]
    if not extra:
        outputs = [
            logits[batch["attention_mask"].bool()] for logits, batch in zip(outputs, (left, right), strict=True)
        ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    alone = {name: tensor[2:] if name != "pixel_values" else tensor[1:] for name, tensor in left.items()}
    extra = {name: tensor[2:] for name, tensor in extra.items()}
    whole = outputs[0][2] if extra else outputs[0][-int(left["attention_mask"][2].sum()) :]
    torch.testing.assert_close(model(**alone, **extra).logits[0], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("language", ["llama", "gpt2", "t5"])
def test_every_embedding_passes_its_site_once(language):
    model = build(language=language)
    batch = make_batch(model)
    seen = {"text": [], "vision": []}
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen["text"].append(i[0].shape))
    model.vision_fusion.register_forward_hook(lambda m, i, o: seen["vision"].append(o.shape))
    extra = {"labels": torch.tensor([[5, 6]] * 3)} if language == "t5" else {}
    model(**batch, **extra)
    assert seen["text"] == [batch["input_ids"].shape]
    assert seen["vision"] == [(3, 9, 32)]


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_loss_reaches_the_projection_and_nothing_frozen(language):
    model = build(language=language)
    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    batch = make_batch(model)
    labels = torch.tensor([[5, 6]] * 3) if language in SEQ2SEQ else batch["input_ids"]
    loss = model.train()(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "image_projection.weight",
        "image_projection.bias",
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in model.language_model.state_dict().items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    gradients = []
    for checkpointing in ("off", "on"):
        model = build().train()
        if checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        batch = make_batch(model)
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(model.image_projection.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_copies(again):
    model = build()
    batch = make_batch(model)
    expected = model(**batch).logits
    torch.testing.assert_close(again(model)(**batch).logits, expected, rtol=0, atol=0)


def test_compile_and_half():
    model = build()
    batch = make_batch(model)
    expected = model(**batch).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, expected)
    assert copy.deepcopy(model).half().dtype == torch.float16
    assert model.bfloat16()(**batch).logits.dtype == torch.bfloat16


def test_tuple_and_extra_outputs():
    model = build()
    output = model(**make_batch(model), output_hidden_states=True, return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].shape[-1] == 100
    assert len(model(**make_batch(model), output_hidden_states=True).hidden_states) == 3
    assert model(**make_batch(model), logits_to_keep=1).logits.shape[1] == 1


def test_embeddings_that_hold_the_images():
    model = build()
    batch = make_batch(model)
    _, embeds, _ = model.embed_inputs(batch["input_ids"], batch["pixel_values"])
    found = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["labels", "decoder_input_ids"])
def test_more_tokens_than_a_decoder_has_positions_for(name: str) -> None:
    """A row with more tokens than the decoder has positions is refused with a clear message. PyTorch would only name
    an index, or stop the process on a GPU."""
    model = build(language="bart")
    with pytest.raises(ValueError, match=r"A row has 1025 tokens, and the decoder takes 1024 \(labels or"):
        model(**make_batch(model), **{name: torch.ones(3, 1025, dtype=torch.long)})


def test_more_tokens_than_an_encoder_has_positions_for() -> None:
    model = build(language="bart")
    batch = make_batch(model)
    short = {"labels": torch.tensor([[5, 6]] * 3)}
    assert model(**batch, **short).loss.isfinite()
    ids = torch.cat([batch["input_ids"], torch.full((3, 1024), 5)], dim=1)
    with pytest.raises(ValueError, match=r"and the encoder takes 1024 \(text and image tokens; shorten"):
        model(**batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **short)
    with pytest.raises(ValueError, match="and the encoder takes 1024"):
        model.generate(**batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_relative_positions_have_no_end() -> None:
    model = build(language="t5")
    model(**make_batch(model), labels=torch.ones(3, 600, dtype=torch.long))


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_trainer_runs_as_it_is(tmp_path, composite, seq2seq_backbone, backbones, language):
    model = composite
    if language == "t5":
        model = type(composite).from_backbones(vision=backbones[0], language=seq2seq_backbone)
    model.config.image_token_id = IMAGE_ID
    rows = []
    for count in (1, 0, 2, 1):
        row = make_batch(model, images_per_row=(count,))
        rows.append({**row, "labels": torch.tensor([[5, 6]]) if language == "t5" else row["input_ids"]})

    def collate(samples):
        width = max(sample["input_ids"].shape[1] for sample in samples)
        batch = {}
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            size = width if name != "labels" or language == "llama" else 2
            parts = [torch.nn.functional.pad(s[name], (0, size - s[name].shape[1]), value=fill) for s in samples]
            batch[name] = torch.cat(parts)
        return {**batch, "pixel_values": torch.cat([s["pixel_values"] for s in samples if "pixel_values" in s])}

    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, gradient_accumulation_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    assert trainer.train().training_loss > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"image_projection.weight", "image_projection.bias"}
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.image_projection.weight, model.image_projection.weight, rtol=0, atol=0)


BAD_INPUTS = {
    "more placeholders": (
        lambda b: {**b, "pixel_values": b["pixel_values"][:2]},
        "27 image tokens .* 2 images give 18",
    ),
    "more images": (lambda b: {**b, "pixel_values": b["pixel_values"].repeat(2, 1, 1, 1)}, "6 images give 54"),
    "no image": (lambda b: {k: v for k, v in b.items() if k != "pixel_values"}, "27 image tokens .* 0 images"),
    "no placeholder": (lambda b: {**b, "input_ids": b["input_ids"].clamp(max=50)}, "0 image tokens .* 3 images"),
    "cut": (
        lambda b: {k: v[:, :-9] if v.ndim == 2 else v for k, v in b.items()},
        "Row 0 has 2 image tokens, .* multiple of 9",
    ),
    "size": (lambda b: {**b, "pixel_values": b["pixel_values"][..., :20]}, r"expected \(images, channels, 30, 30\)"),
    "both": (lambda b: {**b, "vision_features": torch.zeros(3, 9, 24)}, "Got both pixel_values and vision_features"),
    "features": (
        lambda b: {**{k: v for k, v in b.items() if k != "pixel_values"}, "vision_features": torch.zeros(3, 5, 24)},
        r"vision_features have shape \(3, 5, 24\), expected \(images, 9, 24\)",
    ),
    "embeds": (
        lambda b: {"inputs_embeds": torch.zeros(3, 4, 32), "pixel_values": b["pixel_values"]},
        "images only with input_ids",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("method", ["forward", "generate"])
def test_bad_input_is_refused_before_anything_runs(case, method):
    if (case, method) == ("embeds", "generate"):
        pytest.skip("generate words it differently; see test_generation")
    change, message = BAD_INPUTS[case]
    model = build()
    ran = []
    if case not in ("size", "features"):
        model.get_input_embeddings().register_forward_hook(lambda *_: ran.append("text"))
    model.vision_tower.register_forward_hook(lambda *_: ran.append("vision"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**change(make_batch(model)))
    assert not ran
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
