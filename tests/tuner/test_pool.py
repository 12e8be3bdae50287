"""Test a pool of adapters: which ones are on the device, what is copied, and that every adapter stays the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_crome import AdapterPool, CromeConfig, hotswap_adapter
from peft_crome.tuner.pool import RESTS
from tests.tuner.helpers import (
    BOTH,
    Kernels,
    M,
    adapted,
    assert_equal,
    attach,
    crome_weight,
    file_keys,
    logits,
    randomize,
)
from tests.zoo.llava import llava

COUNT = 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save adapters that differ in directories "0", "1", ..., with every second one wider."""
    folder = tmp_path_factory.mktemp("adapters")
    model = attach(llava().model, "0")
    for number in range(1, COUNT):
        model.add_adapter(str(number), CromeConfig(branches=BOTH, bottleneck_dim=M + number % 2))
    for number in range(COUNT):
        randomize(model, str(number), seed=number)
    model.save_pretrained(folder)
    return folder


def pool_of(saved: Path, room: int, rest: str = "memory", **kwargs: Any) -> AdapterPool:
    pool = AdapterPool(adapted(llava(), "first"), room, rest)
    for number in range(COUNT):
        pool.load_adapter(saved / str(number), str(number), **kwargs)
    return pool


def alone(saved: Path, name: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(llava().model, saved / name).eval(), llava().batch)


@pytest.mark.parametrize("rest", RESTS)
def test_each_adapter_is_what_it_is_alone(rest: str, saved: Path) -> None:
    pool = pool_of(saved, 2, rest)
    batch = llava().batch
    for names in (["0", "1"], ["2", "3"], ["4", "__base__"], ["1", "0"], ["1", "3"]):
        found = logits(pool.model, {**batch, "adapter_names": pool.use(names)})
        for row, name in enumerate(names):
            if name != "__base__":
                torch.testing.assert_close(found[row], alone(saved, name)[row], rtol=1e-5, atol=1e-5)
    found = logits(pool.model, {**batch, "adapter_names": ["2", "4"]})  # neither is on the device
    torch.testing.assert_close(found[0], alone(saved, "2")[0], rtol=1e-5, atol=1e-5)


def test_the_one_used_longest_ago_makes_room(saved: Path) -> None:
    pool = pool_of(saved, 3)
    assert (pool.resident, pool.names) == ([], [str(number) for number in range(COUNT)])
    assert math.isnan(pool.hit_rate)
    assert pool.use(["0", "1", "0", "__base__"]) == ["0", "1", "0", "__base__"]
    pool.use(["2"])
    pool.use(["0"])
    pool.use(["3"])
    assert pool.resident == ["2", "0", "3"]
    assert (pool.hits, pool.misses, pool.hit_rate) == (1, 4, 0.2)
    assert repr(pool) == ("AdapterPool(3 of 5 adapters on the device, room for 3, the rest in memory, hit rate 0.20)")


@pytest.mark.parametrize("rest", RESTS)
def test_a_batch_copies_what_is_missing_and_nothing_else(rest: str, saved: Path) -> None:
    pool = pool_of(saved, 3, rest)

    def copies(names: list[str]) -> int:
        with Kernels() as counted:
            pool.use(names)
        return counted.kernels.total()

    assert copies(["0", "1", "2"]) == 3 * len(file_keys(saved / "0"))
    assert copies(["2", "0"]) == 0
    assert copies(["2", "3"]) == len(file_keys(saved / "3"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows which files are mapped")
def test_the_rest_on_disk_is_the_file(saved: Path) -> None:
    pool = pool_of(saved, 1, "disk")
    pool.use(["0"])
    pool.use(["1"])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(saved) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for name in ("0", "2"):
        pointer = crome_weight(pool.model, "up", name).data_ptr()
        assert any(start <= pointer < stop for start, stop in ranges)
    pointer = crome_weight(pool.model, "up", "1").data_ptr()
    assert not any(start <= pointer < stop for start, stop in ranges)


def test_what_changes_on_the_device_is_not_lost(saved: Path) -> None:
    pool = pool_of(saved, 1)
    pool.use(["0"])
    hotswap_adapter(pool.model, saved / "2", "0")
    pool.use(["1"])
    pool.use(["0"])
    assert_equal(crome_weight(pool.model, "up", "0"), crome_weight(pool.model, "up", "2"))
    pool.load_adapter(saved / "4", "4")  # again
    assert pool.resident == ["0"]


def test_adapters_stay_peft_s(saved: Path, tmp_path: Path) -> None:
    pool = pool_of(saved, 2)
    pool.use(["0", "1"])
    pool.model.delete_adapter("1")
    with pytest.raises(ValueError, match=r"\['1'\]: not in the pool\. Write pool\.load_adapter\(<directory>, '1'\)"):
        pool.use(["1"])
    assert (pool.resident, pool.names) == (["0"], ["0", "2", "3", "4"])
    pool.load_adapter(saved / "2", "1")
    pool.use(["1"])
    pool.model.save_pretrained(tmp_path, selected_adapters=["1", "3"])
    for name, expected in (("1", "2"), ("3", "3")):
        assert_equal(alone(tmp_path, name), alone(saved, expected))
    pool.model.set_adapter("3")
    assert_equal(logits(pool.model, llava().batch), alone(saved, "3"))
    with torch.inference_mode():
        pool.use(["4"])
    assert not crome_weight(pool.model, "up", "4").is_inference()


def test_what_is_refused(saved: Path) -> None:
    pool = pool_of(saved, 2)
    with pytest.raises(ValueError, match=r"3 adapters are in one batch; the pool holds 2\. .*room=3\), or smaller"):
        pool.use(["0", "1", "2"])
    assert (pool.resident, pool.misses) == ([], 0)
    with pytest.raises(ValueError, match="room=0 is too small"):
        AdapterPool(pool.model, 0)
    with pytest.raises(ValueError, match=r"rest='tape' is unknown\. Write one of \('memory', 'disk'\)"):
        AdapterPool(pool.model, 1, "tape")
    for model in (llava().model, get_peft_model(llava().model, LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match="has no CROME adapter"):
            AdapterPool(model, 1)
    half = AdapterPool(attach(llava().model.bfloat16(), "first"), 1, "disk")
    with pytest.raises(ValueError, match=r"'0' is stored in torch\.float32 and has torch\.bfloat16 on the model"):
        half.load_adapter(saved / "0", "0", autocast_adapter_dtype=False)
    assert "0" not in half.model.peft_config
