"""Test that the adapter follows its model to a device, with files, caches, attention kernels and compiled decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig

from peft_crome import cache_features, hotswap_adapter
from tests.tuner.helpers import BOTH, adapted, assert_equal, attach, crome_weight, frozen_logits, logits, to_dtype
from tests.tuner.test_hotswap import save_adapter
from tests.tuner.test_training import gradients
from tests.vlm.tiny import build, make_batch
from tests.zoo.case import moved
from tests.zoo.llava import llava

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `_thread.get_ident"),
]


@pytest.fixture
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fresh_adapter_leaves_logits_bit_equal(dtype: torch.dtype, place: str) -> None:
    case = llava().to(place)
    case.model.to(dtype)
    case.batch = to_dtype(case.batch, dtype)
    expected = frozen_logits(case)
    model = attach(case.model).eval()
    assert {crome_weight(model, name).device.type for name in ("up", "gate_text", "down_vision")} == {place}
    assert_equal(logits(model, case.batch), expected)


def test_file_of_one_device_is_loaded_on_another(place: str, tmp_path: Path) -> None:
    case = llava().to(place)
    model = adapted(case)
    model.save_pretrained(tmp_path)
    for other in {place, "cpu"}:
        there = llava().to(other)
        loaded = PeftModel.from_pretrained(there.model, tmp_path).eval()
        assert crome_weight(loaded, "up").device.type == other
        found = logits(loaded, there.batch).to(place)
        torch.testing.assert_close(found, logits(model, case.batch), rtol=1e-4, atol=1e-4)


def test_hotswap_keeps_the_tensors(place: str, tmp_path: Path) -> None:
    case = llava().to(place)
    model = adapted(case)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    expected = save_adapter(tmp_path).to(place)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, case.batch), expected, rtol=1e-4, atol=1e-4)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerge_is_exact(dtype: torch.dtype, place: str) -> None:
    case = llava().to(place)
    case.model.to(dtype)
    case.batch = to_dtype(case.batch, dtype)
    model = adapted(case)
    expected = logits(model, case.batch)
    model.merge_adapter()
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(logits(model, case.batch), expected, **near)
    model.unmerge_adapter()
    assert_equal(logits(model, case.batch), expected)


def test_features_of_a_cache_come_to_the_model_s_device(place: str, tmp_path: Path) -> None:
    model = build().requires_grad_(False).to(place)
    batch = moved(make_batch(model), place)
    expected = logits(model, batch)
    cache = cache_features(model, tmp_path)
    assert_equal(logits(model, batch), expected)
    assert_equal(logits(model, batch), expected)
    images = len(batch["pixel_values"])
    assert (cache.hits, cache.misses) == (images, images)


def test_images_that_do_not_fit_the_prompt_are_refused(place: str) -> None:
    """An error stops a batch with too few images before the language model runs. On a GPU the counts are copied in the
    background."""
    model = build().to(place)
    batch = moved(make_batch(model), place)
    ran: list[str] = []
    model.language_model.register_forward_pre_hook(lambda *_: ran.append("language model"))
    batch["pixel_values"] = batch["pixel_values"][:-1]
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        logits(model, batch)
    assert ran == []


def test_flash_attention_changes_nothing_of_the_adapter(place: str) -> None:
    """With flash attention in bfloat16, a fresh adapter is an identity. The gradients of a random adapter are close to
    those of plain attention."""
    case = llava().to(place)
    case.model.to(torch.bfloat16)
    case.batch = to_dtype(case.batch, torch.bfloat16)
    del case.batch["attention_mask"]  # flash attention takes none
    case.model.set_attn_implementation("sdpa")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = frozen_logits(case)
        assert_equal(logits(attach(case.model).eval(), case.batch), expected)
        case.model = llava().model.to(place, torch.bfloat16)
        model = adapted(case)
        found = gradients(model, case.batch)
    with sdpa_kernel(SDPBackend.MATH):
        for key, gradient in gradients(model, case.batch).items():
            assert gradient.any(), key
            assert torch.cosine_similarity(found[key].flatten(), gradient.flatten(), dim=0) > 0.98, key


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("branches", [None, BOTH], ids=["vision", "both"])
def test_static_cache_decodes_the_same_tokens(branches: list[str] | None, place: str) -> None:
    """Compiled decoding with a static cache gives the same tokens. On a GPU it uses CUDA graphs, whose replays read
    the same memory each time."""
    case = llava().to(place)
    model = adapted(case, branches=branches or ["vision"])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**case.generate_inputs(), **settings)
    compiled = CompileConfig() if place == "cuda" else CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    for _ in range(3):
        found = model.generate(
            **case.generate_inputs(), **settings, cache_implementation="static", compile_config=compiled
        )
        assert_equal(found, expected)
    assert hasattr(case.model, "_compiled_call")


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training_gives_the_same_gradients(place: str) -> None:
    """A compiled model has the same gradients in each of four steps. On a GPU it uses CUDA graphs, which begin with
    the third step."""
    case = llava().to(place)
    model = adapted(case)
    expected = gradients(model, case.batch)
    options = {"mode": "reduce-overhead"} if place == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, **options)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        compiled.train()(**case.batch).loss.backward()
        for key, gradient in expected.items():
            found = crome_weight(model, key.removeprefix("crome_")).grad
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4, msg=key)
