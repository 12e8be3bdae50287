"""Test that a frozen tower's features are computed once per image and used for no other image, tower or setting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import InstructBlipQFormerConfig

from peft_crome import CromeConfig, cache_features
from peft_crome.features.store import FeatureStore
from tests.tuner.helpers import assert_equal, attach, logits
from tests.vlm.tiny import build, make_batch
from tests.zoo.case import ZOO
from tests.zoo.llava import llava

# Towers that read the patches of all images at once, or that are a part of the language model.
REASONS = r"cannot be kept by image|has \d vision towers that its configuration|unknown what to keep|divided by image"


def no_tower(model: nn.Module) -> None:
    """Make the tower's layers fail, so that features can only be read."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the tower was run")

    for part in model.vision_tower.children():
        part.register_forward_pre_hook(refuse)


def frozen(**kwargs: Any) -> Any:
    """Build a composite with frozen backbones, as `from_backbones` returns it."""
    model = build(**kwargs)
    model.vision_tower.requires_grad_(False)
    return model.eval()


@pytest.mark.parametrize("qformer", [False, True], ids=["patches", "qformer"])
def test_composite_reads_its_features_the_second_time(qformer: bool, tmp_path: Path) -> None:
    config = InstructBlipQFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=24,
        vocab_size=200,
    )  # fmt: skip
    model = frozen(qformer_config=config, num_query_tokens=4) if qformer else frozen(vision_pool_size=3)
    batch = make_batch(model)
    if qformer:
        batch["qformer_input_ids"] = torch.arange(3).repeat(len(batch["pixel_values"]), 1)
    expected = logits(model, batch)
    cache = cache_features(model, tmp_path)
    images = len(batch["pixel_values"])
    assert_equal(logits(model, batch), expected)
    assert (cache.hits, cache.misses) == (0, images)
    no_tower(model)
    assert_equal(logits(model, batch), expected)
    assert (cache.hits, cache.misses) == (images, images)
    with pytest.raises(AssertionError, match="the tower was run"):
        model(**batch | {"pixel_values": batch["pixel_values"] + 1e-6})


def test_training_with_a_cache_is_the_same(tmp_path: Path) -> None:
    losses = []
    for cached in (False, True):
        model = frozen()
        batch = make_batch(model)
        peft_model = attach(model, init_weights=False, modules_to_save=["image_projection"]).train()
        if cached:
            cache_features(peft_model, tmp_path)
        optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = peft_model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert losses[2] < losses[0]


COMMON = ("llava", "llava_next", "internvl", "gemma3", "paligemma", "smolvlm", "idefics3", "instructblip")


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_cached_or_says_why_not(name: str, tmp_path: Path) -> None:
    case = ZOO[name]()
    case.model.requires_grad_(False)
    expected = logits(case.model, case.batch)
    refusals = []
    try:
        cache = cache_features(case.model, tmp_path)
        first = logits(case.model, case.batch)
    except ValueError as error:
        refusals.append(str(error))
    if refusals:
        assert re.search(REASONS, refusals[0]), refusals
        assert name not in COMMON
        return
    torch.testing.assert_close(first, expected)  # features lie in memory in another order: kernels may round unlike
    assert cache.misses > 0
    missed = cache.misses
    assert_equal(logits(case.model, case.batch), first)
    assert (cache.hits, cache.misses) == (missed, missed)
    cache.detach()
    assert_equal(logits(case.model, case.batch), expected)
    assert cache.hits == missed


def test_each_change_is_another_entry(tmp_path: Path) -> None:
    """Features are not reused after a change of the pixels, the tower's weights or configuration, or the layer that is
    read."""

    def entries(change: str = "", **kwargs: Any) -> tuple[int, int]:
        model = frozen(**kwargs)
        pixel_values = make_batch(model)["pixel_values"].clone()
        if change == "weight":
            model.vision_tower.state_dict()["encoder.layers.0.mlp.fc1.bias"][3] += 1e-3
        elif change == "dtype":
            model.vision_tower.half().float()
        elif change == "pixel":
            pixel_values[:, 0, 0, 0] += 1e-6
        elif change == "normalization":
            pixel_values = (pixel_values - 0.1) / 1.1
        elif change == "config":
            model.vision_tower.config.layer_norm_eps *= 2
        cache = cache_features(model, tmp_path)
        with torch.no_grad():
            model.get_vision_features(pixel_values)
        return cache.hits, cache.misses

    assert entries() == (0, 3)
    assert entries() == (3, 0)
    for change in ("weight", "dtype", "pixel", "normalization", "config"):
        assert entries(change) == (0, 3), change
    for setting in ({"vision_feature_layer": -2}, {"vision_feature_select_strategy": "full"}, {"vision_pool_size": 3}):
        assert entries(**setting) == (0, 3), setting


@pytest.mark.parametrize("name", ["composite", "llava"])
def test_features_under_autocast_are_kept_apart(name: str, tmp_path: Path) -> None:
    """Runs in float32, bfloat16 and float16 share a folder, and none reads the features of another."""
    model, batch = (frozen(), None) if name == "composite" else (llava().model, llava().batch)
    batch = make_batch(model) if batch is None else batch
    model.requires_grad_(False).eval()

    def run(dtype: torch.dtype | None) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return logits(model, batch)

    settings = (None, torch.bfloat16, torch.float16)
    expected = [run(dtype) for dtype in settings]
    cache = cache_features(model, tmp_path)
    for _ in range(2):
        for dtype, wanted in zip(settings, expected, strict=True):
            assert_equal(run(dtype), wanted)
    assert cache.hits == cache.misses == 3 * len(batch["pixel_values"])


WORKER = """
import sys, torch
from pathlib import Path
from peft_crome.features.store import FeatureStore
store = FeatureStore(sys.argv[1], 10**9)
for number in range(300):
    key = f"{number % 100:02d}key"
    found = store.get(key)
    if found is not None:
        assert torch.equal(found["x"], torch.full((64, 8), float(number % 100))), number
    store.put(key, {"x": torch.full((64, 8), float(number % 100))})
    print(number, flush=True)
"""


def test_two_processes_fill_it_and_one_is_killed(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = workers
    with first, second:
        for line in second.stdout or ():
            if int(line) == 40:
                second.kill()
                break
        output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 100
    for file in files:
        assert torch.equal(load_file(file)["x"], torch.full((64, 8), float(file.name[:2])))


def test_damaged_files_are_computed_again_and_remains_are_removed(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 10**9)
    value = {"x": torch.arange(8.0)}
    store.put("abkey", value)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    assert store.get("abkey") is None
    store.put("abkey", value)
    assert torch.equal(store.get("abkey")["x"], value["x"])  # type: ignore[index]
    old, new = path.with_name("old.tmp"), path.with_name("new.tmp")
    for file in (old, new):
        file.write_bytes(b"x" * 10)
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    FeatureStore(tmp_path, 10**9)
    assert not old.exists()
    assert new.exists()  # of a process that may be writing it


def test_write_that_fails_leaves_nothing_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(error: BaseException) -> Any:
        def replace(source: Path, target: Path) -> None:
            assert source.is_file()
            raise error

        return replace

    store = FeatureStore(tmp_path, 10**9)
    for _ in range(2):
        monkeypatch.setattr(os, "replace", failing(OSError("No space left on device")))
        assert not store.put("abkey", {"x": torch.zeros(2)})
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert caplog.text.count("cannot be written to (No space left on device): features") == 1
    monkeypatch.setattr(os, "replace", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        store.put("abkey", {"x": torch.zeros(2)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert store.put("abkey", {"x": torch.zeros(2)})
    (tmp_path / "cd").touch()  # no folder can be made there
    assert not store.put("cdkey", {"x": torch.zeros(2)})
    assert caplog.text.count("cannot be written to") == 1


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077], ids="{:03o}".format)
def test_files_have_the_permissions_of_any_other(umask: int, tmp_path: Path) -> None:
    """Files of features have the permissions of any other new file. Whoever may read a shared folder may read its
    files."""
    store = FeatureStore(tmp_path / "features", 10**9)
    before = os.umask(umask)
    try:
        store.put("abkey", {"x": torch.zeros(2)})
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    (file,) = tmp_path.rglob("abkey.safetensors")
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = frozen()
    size = model.get_vision_features(torch.zeros(1, 3, 30, 30)).numel() * 4
    cache = cache_features(model, tmp_path, max_gigabytes=3.5 * size / 1e9)
    images = torch.randn(8, 3, 30, 30)
    with torch.no_grad():
        first = model.get_vision_features(images)
        assert_equal(model.get_vision_features(images), first)
    kept = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert 2 <= cache.hits <= 3
    assert 0 < kept <= 3.5 * size + 3 * 512  # and a header in each file
    assert caplog.text.count("is full") == 1


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    model = frozen()
    model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trains, so its features change .* tower.requires_grad_\(False\)"):
        cache_features(model, tmp_path)
    model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match=r"leaves no room\. Write max_gigabytes=50"):
        cache_features(model, tmp_path, max_gigabytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file\. Name a folder"):
        cache_features(model, tmp_path / "file")
    cache = cache_features(model, tmp_path / "features")
    with pytest.raises(ValueError, match=r"has a cache or another hook already. Call its detach\(\) first"):
        cache_features(model, tmp_path / "features")
    model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match=r"tower trains, .* Call cache.detach\(\) first"):
        model.get_vision_features(torch.zeros(1, 3, 30, 30))
    cache.detach()
    assert model.get_vision_features(torch.zeros(1, 3, 30, 30)).requires_grad


def test_an_adapter_beside_a_cache_is_saved_and_loaded(tmp_path: Path) -> None:
    case = llava()
    model = attach(case.model, init_weights=False).eval()
    cache_features(model, tmp_path / "features")
    expected = logits(model, case.batch)
    model.save_pretrained(tmp_path / "adapter")
    other = attach(llava().model).eval()
    other.load_adapter(tmp_path / "adapter", "loaded")
    other.set_adapter("loaded")
    assert_equal(logits(other, case.batch), expected)
    assert CromeConfig.from_pretrained(tmp_path / "adapter").bottleneck_dim == 4
