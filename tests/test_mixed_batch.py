"""Test `adapter_names` with several images in a row, rows without images, beams and the composite, and test what is
refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_crome import CromeConfig
from peft_crome.tuner.layer import crome_layers
from tests.tuner.helpers import BOTH, M, adapted, logits, randomize
from tests.vlm.tiny import build, make_batch
from tests.zoo import ZOO, Batch
from tests.zoo.case import moved

ADAPTERS = ("first", "second", "__base__")


def with_adapters(model: Any, **config: Any) -> PeftModel:
    """Attach two adapters that differ from each other and from an identity."""
    config.setdefault("branches", BOTH)
    model = get_peft_model(model, CromeConfig(bottleneck_dim=M, **config), adapter_name="first")
    model.add_adapter("second", CromeConfig(bottleneck_dim=2 * M, **config))
    for seed, name in enumerate(("first", "second")):
        randomize(model, name, seed=seed)
    return model.eval()


def in_turn(model: PeftModel, call: Any) -> dict[str, Any]:
    """Return what `call` gives with each adapter on every row, and without an adapter."""
    found = {}
    for name in ADAPTERS[:2]:
        model.set_adapter(name)
        found[name] = call()
    with model.disable_adapter():
        found["__base__"] = call()
    return found


def assert_rows(model: PeftModel, batch: Batch, names: list[str], differs: bool = True) -> None:
    single = in_turn(model, lambda: logits(model, batch))
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=1e-4, atol=1e-5)
    assert torch.allclose(single["first"], single["second"], rtol=1e-3, atol=1e-3) != differs


def uneven(name: str) -> tuple[Any, Batch]:
    """Return a host and a batch. The first row has two images, and the second has one and is padded on the left."""
    case = ZOO[name]()
    given = case.batch
    image = given["input_ids"][0, 1:-2].tolist()
    rows = [[1, *image, 9, *image, 5, 6], [*[0] * (len(image) + 1), 1, *image, 7, 8]]
    mask = [[1] * len(rows[0]), [0] * (len(image) + 1) + [1] * (len(image) + 3)]
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    for key, value in given.items():
        if key.endswith("token_type_ids"):
            batch[key] = (batch["input_ids"] == 60).int()
        elif key.startswith(("pixel", "image")):
            half = len(value) // 2
            third = value[:half] + 0.5 if value.is_floating_point() else value[:half]
            batch[key] = torch.cat([value[:half], third, value[half:]])
    if name == "llava_onevision":
        batch["batch_num_images"] = torch.tensor([1, 1, 1])  # each is cut into tiles
    return case.model, batch


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_5_vl", "gemma3", "internvl", "llava_next", "llava_onevision", "hunyuan_vl"]
)
@pytest.mark.parametrize("names", [["first", "second"], ["second", "__base__"]], ids="-".join)
def test_several_images_in_a_row(name: str, names: list[str], device: str) -> None:
    model, batch = uneven(name)
    assert_rows(with_adapters(model.to(device)), moved(batch, device), names)


def qformer_composite() -> Any:
    import transformers as tf

    qformer = tf.InstructBlipQFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, encoder_hidden_size=24,
        vocab_size=100, cross_attention_frequency=2,
    )  # fmt: skip
    return build(qformer_config=qformer.to_dict(), num_query_tokens=3)


COMPOSITES = {
    "llama": build,
    "gpt2": lambda: build(language="gpt2"),
    "t5": lambda: build(language="t5"),
    "qformer": qformer_composite,
}


@pytest.mark.parametrize("kind", COMPOSITES)
@pytest.mark.parametrize("images", [(1, 0, 2), (1, 1, 1), (0, 0, 3), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("names", [["first", "second", "__base__"], ["second", "first", "first"]], ids="-".join)
def test_composite(kind: str, images: tuple[int, ...], names: list[str]) -> None:
    model = COMPOSITES[kind]()
    batch = make_batch(model, images_per_row=images)
    if kind == "t5":
        batch["labels"] = torch.tensor([[9, 10, 1], [11, 12, 1], [13, 14, 1]])
    if kind == "qformer" and sum(images):
        batch["qformer_input_ids"] = torch.tensor([[5, 6, 7]] * sum(images))
        batch["qformer_attention_mask"] = torch.ones_like(batch["qformer_input_ids"])
    # With a Q-Former the text branch reads its tokens, and instructions stay as they are.
    assert_rows(with_adapters(model), batch, names, differs=kind != "qformer" or sum(images) > 0)


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "without cache": {"use_cache": False},
}


@pytest.mark.parametrize("settings", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "instructblip", "instructblip_t5"])
def test_generate(name: str, settings: dict[str, Any], device: str) -> None:
    case = ZOO[name]().to(device)
    model = with_adapters(case.model)
    assert_generated(model, case.generate_inputs(), ["first", "second"], settings)


@pytest.mark.parametrize("settings", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_composite_generates(kind: str, settings: dict[str, Any], device: str) -> None:
    model = COMPOSITES[kind]().to(device)
    assert_generated(with_adapters(model), moved(make_batch(model), device), ["second", "first", "__base__"], settings)


def assert_generated(model: PeftModel, inputs: Batch, names: list[str], settings: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [60]} | settings
    single = in_turn(model, lambda: model.generate(**inputs, **options))
    mixed = model.generate(**inputs, **options, adapter_names=names)
    each = len(mixed) // len(names)
    for row, name in enumerate(names):
        part = slice(row * each, (row + 1) * each)
        assert torch.equal(mixed[part], single[name][part])


def test_many_adapters_on_one_batch() -> None:
    model = build()
    peft_model = with_adapters(model)
    for number in range(14):
        peft_model.add_adapter(f"a{number}", CromeConfig(branches=BOTH, bottleneck_dim=M))
        randomize(peft_model, f"a{number}", seed=100 + number)
    names = [f"a{number}" for number in range(14)] + ["first", "second"]
    batch = make_batch(model, images_per_row=tuple(number % 3 for number in range(16)))
    with torch.no_grad():
        mixed = peft_model(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            peft_model.set_adapter(name)
            torch.testing.assert_close(mixed[row], peft_model(**batch).logits[row], rtol=1e-4, atol=1e-5)


def test_modules_that_train_as_well_have_their_row_too() -> None:
    """Each row uses its adapter's own copy of the head. It also uses its own copy of the projection if each row has
    one image."""
    model = with_adapters(build(), modules_to_save=["lm_head", "image_projection"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    batch = make_batch(model.get_base_model(), images_per_row=(1, 1, 1))
    assert_rows(model, batch, ["first", "second", "__base__"])
    batch = make_batch(model.get_base_model(), images_per_row=(1, 0, 1))
    with pytest.raises(ValueError, match=r"got 2 inputs for 3 rows; with adapter_names it takes one image per row"):
        model(**batch, adapter_names=["first", "second", "__base__"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = with_adapters(build().to(dtype))
    batch = make_batch(model.get_base_model())
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    single = in_turn(model, lambda: logits(model, batch))
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["first", "second", "first"]).logits
    for row, name in enumerate(["first", "second", "first"]):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"], r"Length of `adapter_names` should be the same .* got 1 and 2"),
        (["default", "other"], r"non-existing adapter\(s\): other\. The model has \['default'\]"),
    ],
    ids=["too few", "unknown"],
)
def test_names_that_are_refused(names: list[str], message: str, method: str) -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    call, batch = (model, case.batch) if method == "forward" else (model.generate, case.generate_inputs())
    with pytest.raises(ValueError, match=message):
        call(**batch, adapter_names=names)


def test_what_is_refused() -> None:
    case = ZOO["llava"]()
    model = adapted(case)
    names = ["default", "__base__"]
    with pytest.raises(ValueError, match=r"when the model is in training mode\. Write model\.eval\(\)"):
        model.train()(**case.batch, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="please call `unmerge_adapter` first"):
        model(**case.batch, adapter_names=names)
    model.unmerge_adapter()
    model(**case.batch, adapter_names=names)
    expected = logits(model, case.batch)
    with pytest.raises(RuntimeError):
        model(**{**case.batch, "pixel_values": torch.randn(2, 5, 8, 8)}, adapter_names=names)
    assert torch.equal(logits(model, case.batch), expected)  # nothing is left behind by an error


def test_embeddings_instead_of_ids_are_one_image_per_row() -> None:
    """With embeddings instead of ids, each row must have one image. Without ids, the number of images in a row is
    unknown."""
    case = ZOO["llava"]()
    model = with_adapters(case.model)
    embeddings = model.get_base_model().get_input_embeddings()
    batch = {key: value for key, value in case.batch.items() if key != "input_ids"}
    single = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        with torch.no_grad():
            single[name] = embeddings(case.batch["input_ids"])
    batch["inputs_embeds"] = torch.stack([single["first"][0], single["second"][1]])
    expected = in_turn(model, lambda: logits(model, batch))
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["first", "second"]).logits
    for row, name in enumerate(("first", "second")):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-4, atol=1e-5)
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)[:3]
    with pytest.raises(ValueError, match="do not match the placeholders of the rows"):
        model(**batch, adapter_names=["first", "second"])


def test_lora_takes_them_as_before() -> None:
    """LoRA takes `adapter_names` as before, because PEFT's own methods are not changed."""
    model = get_peft_model(ZOO["llava"]().model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    batch = ZOO["llava"]().batch
    with torch.no_grad():
        rows = model(**batch, adapter_names=["default", "__base__"]).logits
        base = model(**batch, adapter_names=["__base__"] * 2).logits
    assert not torch.allclose(rows[0], base[0])
    torch.testing.assert_close(rows[1], base[1])


def image_and_video(name: str) -> tuple[Any, Batch]:
    """Return a host and a batch with an image in the first row and a video in the second. Hosts read images first,
    whichever row they are in."""
    import transformers as tf

    if name == "qwen2_vl":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        text = {"vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "rope_parameters": rope, **sizes}
        vision = {
            "depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2,
        }  # fmt: skip
        special = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 57, "vision_end_token_id": 58}
        config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
        model = tf.Qwen2VLForConditionalGeneration(config)
        ids = torch.tensor([[1, 57, *[60] * 4, 58, 5, 6], [1, 57, *[59] * 4, 58, 7, 8]])
        grid = torch.tensor([[1, 4, 4]])
        batch = {
            "pixel_values": torch.randn(16, 96), "image_grid_thw": grid, "pixel_values_videos": torch.randn(16, 96),
            "video_grid_thw": grid, "mm_token_type_ids": (ids == 60).int() + 2 * (ids == 59).int(),
        }  # fmt: skip
        return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **batch}
    model = ZOO["llava_onevision"]().model
    ids = torch.tensor([[1, *[60] * 10, 5, 6], [*[0] * 7, 1, *[59] * 3, 7, 8]])
    batch = {
        "pixel_values": torch.randn(1, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]]),
        "pixel_values_videos": torch.randn(1, 2, 3, 8, 8),
    }  # fmt: skip
    return model, {"input_ids": ids, "attention_mask": (ids != 0).long(), **batch}


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_an_image_in_one_row_and_a_video_in_another(name: str) -> None:
    torch.manual_seed(0)
    model, batch = image_and_video(name)
    model = with_adapters(model)
    assert_rows(model, batch, ["first", "second"])
    mixed = logits(model, {**batch, "adapter_names": ["first", "second"]})
    swapped = logits(model, {**batch, "adapter_names": ["second", "first"]})
    assert not torch.allclose(mixed, swapped, rtol=1e-4, atol=1e-5)


def test_tiles_in_the_number_of_rows_are_no_image_per_row() -> None:
    """Tiles are not assigned one to a row when there are as many tiles as rows. The tiles of two images in one row
    cannot be separated, so the batch is refused."""
    model = with_adapters(ZOO["llava_next"]().model)
    image = ZOO["llava_next"]().batch["input_ids"][0].eq(60).sum().item()
    rows = [[1, *[60] * (2 * image), 5, 6], [1, *[60] * image, 7, 8], *[[1, 9, 10, k] for k in range(11, 15)]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    given = ZOO["llava_next"]().batch
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.cat([given["pixel_values"]] * 2)[:3],
        "image_sizes": torch.cat([given["image_sizes"]] * 2)[:3],
    }
    logits(model, batch)
    with pytest.raises(ValueError, match=r"do not match the placeholders of the rows"):
        model(**batch, adapter_names=["first", "second"] * 3)


def embedded(model: PeftModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.get_base_model().get_input_embeddings()(batch["input_ids"]).detach()


@pytest.mark.parametrize("names", [["first"], ["first", "second", "first", "second"]], ids=["too few", "too many"])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_rows_are_counted_whatever_stands_for_them(task_type: str | None, given: str, names: list[str]) -> None:
    """A wrong number of names is refused for ids and for embeddings. PEFT's class for causal models passes no ids to a
    tuner's hooks."""
    case = ZOO["llava"]()
    model = with_adapters(case.model, task_type=task_type)
    batch = case.batch if given == "ids" else {"inputs_embeds": embedded(model, case.batch)}
    with pytest.raises(ValueError, match=rf"Length of `adapter_names` .* got {len(names)} and 2"):
        model(**batch, adapter_names=names)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_embeddings_are_counted_before_generation(task_type: str | None) -> None:
    case = ZOO["llava"]()
    model = with_adapters(case.model, task_type=task_type)
    embeddings = embedded(model, case.batch)
    with pytest.raises(ValueError, match=r"Length of `adapter_names` .* got 1 and 2"):
        model.generate(inputs_embeds=embeddings, adapter_names=["first"], max_new_tokens=2)


def test_calls_in_two_threads_do_not_meet() -> None:
    """Calls in several threads do not affect each other, with an adapter for each row and without. A server makes such
    calls."""
    import threading

    case = ZOO["llava"]()
    model = with_adapters(case.model)
    single = in_turn(model, lambda: logits(model, case.batch))
    model.set_adapter("first")
    meet, wrong = threading.Barrier(3), []
    hooks = set(model.get_base_model()._forward_pre_hooks)

    def ask(name: str | None) -> None:
        meet.wait()
        for _ in range(20):
            with torch.no_grad():
                found = model(**case.batch, **({} if name is None else {"adapter_names": [name] * 2})).logits
            if not torch.allclose(found, single[name or "first"], rtol=1e-4, atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.get_base_model()._forward_pre_hooks.keys() == hooks


def test_ids_on_another_device_than_the_table() -> None:
    """Ids may be on another device than the table. In a model that accelerate has dispatched, hooks move ids only
    inside the table."""
    model = with_adapters(ZOO["llava"]().model)
    site = model.get_base_model().get_input_embeddings()
    away = site._adapt(torch.empty(1, 3, site.out_features, device="meta"), ["first"], torch.tensor([[1, 60, 5]]))
    assert away.is_meta


def test_which_came_first_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is refused if the order of its images and videos is unknown. Its host reads them in methods of other
    names."""
    monkeypatch.setattr("peft_crome.tuner.mixed_batch.owners.METHODS", {})
    model, batch = image_and_video("qwen2_vl")
    model = with_adapters(model)
    with pytest.raises(ValueError, match=r"\['image', 'video'\] in unknown order"):
        model(**batch, adapter_names=["first", "second"])
    logits(model, {**batch, "adapter_names": ["first", "first"]})  # whichever: all rows have one adapter


def test_a_model_compiles_in_one_graph_after_a_mixed_batch() -> None:
    case = ZOO["llava"]()
    model = with_adapters(case.model)
    model(**case.batch, adapter_names=["first", "second"])
    site = next(layer for path, layer in crome_layers(model) if "projector" in path)
    features = torch.randn(1, 4, case.model.config.vision_config.hidden_size)
    compiled = torch.compile(site, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), site(features))


def test_names_do_not_turn_disabled_adapters_on() -> None:
    case = ZOO["llava"]()
    expected = case.model(**case.batch).logits
    model = with_adapters(case.model)
    with model.disable_adapter():
        found = model(**case.batch, adapter_names=["first", "second"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(model(**case.batch, adapter_names=["first", "second"]).logits, expected)
