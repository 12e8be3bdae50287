"""Test the lookup of GPUs by name and by size, and the measured speed of this machine."""

import pytest
import torch

from peft_crome.training.planning.devices import GIB, GPUS, DeviceError, find_gpu, matmul_rate, this_device


@pytest.mark.parametrize("name", ["h100", "a100-80", "a100-40", "l40s", "rtx4090", "rtx3090", "t4"])
def test_known_gpus_are_found(name: str) -> None:
    assert find_gpu(name.upper()) is GPUS[name]


def test_any_size_is_found_and_known_gpus_have_a_speed() -> None:
    assert 46 * GIB > find_gpu("48gb").memory > 43 * GIB
    assert find_gpu("48gb").seconds(10**12, torch.bfloat16) is None
    slow, fast = find_gpu("h100").seconds(10**15, torch.bfloat16), find_gpu("t4").seconds(10**15, torch.bfloat16)
    assert slow is not None
    assert 1 < slow[0] < 10
    assert fast is None  # a T4 computes no bfloat16


@pytest.mark.parametrize("name", ["h10", "1gb", "gb", "-8gb"])
def test_unknown_gpu_names_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError, match=r"known are h100, a100-80, .*and any size"):
        find_gpu(name)
    with pytest.raises(DeviceError, match="Did you mean 'h100'"):
        find_gpu("h10")


def test_rate_of_this_machine_is_measured() -> None:
    device = this_device(torch.device("cpu"), torch.float32)
    assert device.memory > GIB // 4
    assert 1e8 < device.rates[torch.float32] < 1e14
    low, high = device.seconds(10**12, torch.float32) or (0, 0)
    assert 0 < low < high
    assert matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(device.rates[torch.float32], rel=0.9)
