"""Detect which weights of a backbone differ from those that its name gives."""

from collections.abc import Mapping

import torch

Samples = dict[str, tuple[torch.Size, torch.Tensor]]
NUM_VALUES = 4096  # from a tensor without columns: a bias or a packed quantized weight


def take_samples(weights: Mapping[str, torch.Tensor]) -> Samples:
    """Take some values of each tensor, on the CPU, with its shape. Tensors without values are left out.

    Each row and each column gives one or more, so that a hand-set embedding is detected as well as a merged LoRA.
    """
    return {key: (tensor.shape, _values(tensor)) for key, tensor in weights.items() if _is_readable(tensor)}


def changed(weights: Mapping[str, torch.Tensor], samples: Samples) -> set[str]:
    """Return keys whose values or shape differ from the samples'. A cast such as `model.half()` is not a change."""
    readable = {key: tensor for key, tensor in weights.items() if key in samples and _is_readable(tensor)}
    return {key for key, tensor in readable.items() if _differs(tensor, *samples[key])}


def _differs(tensor: torch.Tensor, shape: torch.Size, values: torch.Tensor) -> bool:
    if tensor.shape != shape:
        return True
    # Compare bits: packed 4-bit weights stored as floats can look like NaN, which equals nothing.
    return not torch.equal(_values(tensor).view(torch.uint8), values.to(tensor.dtype).view(torch.uint8))


def _is_readable(tensor: torch.Tensor) -> bool:
    # The values of a DTensor are in other processes.
    return not tensor.is_meta and type(tensor.data) is torch.Tensor


def _values(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach()
    columns = flat.shape[-1] if flat.ndim > 1 else 1
    if columns == 1 or flat.numel() == 0:
        flat = flat.reshape(-1)
        return flat[:: max(1, flat.numel() // NUM_VALUES)].cpu().clone()
    flat = flat.reshape(-1, columns)
    if flat.dtype.itemsize == 1:
        flat = flat.view(torch.uint8)  # not all of these small types can be indexed
    steps = torch.arange(max(flat.shape), device=flat.device)  # along a diagonal that wraps around at each border
    return flat[steps % len(flat), steps % columns].cpu().view(tensor.dtype)
