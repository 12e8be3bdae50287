"""Images that a model cuts into tiles: how many there are of each image, and in each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiles_of_images(model: nn.Module, keywords: dict[str, Any]) -> list[int] | None:
    """How many tiles each image was cut into, where its size says so (LLaVA-NeXT and its kin)."""
    config: Any = getattr(model, "config", None)
    pinpoints, sizes = getattr(config, "image_grid_pinpoints", None), keywords.get("image_sizes")
    if pinpoints is None or sizes is None:
        return None
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = [image_size_to_num_patches(size, pinpoints, config.vision_config.image_size) for size in sizes]
    images = keywords.get("batch_num_images")  # LLaVA-OneVision cuts an image that is alone in its row
    if images is not None:
        alone = [count == 1 for count in images.tolist() for _ in range(count)]
        tiles = [count if cut else 1 for count, cut in zip(tiles, alone, strict=True)]
    return tiles


def tiles_of_rows(is_image: torch.Tensor, tiles: list[int]) -> torch.Tensor | None:
    """How many tiles each row has, where its images stand apart; None where they do not.

    Args:
        is_image: (rows, length).
        tiles: of each image, in order.
    """
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    images = starts.sum(-1)
    if int(images.sum()) != len(tiles):
        return None
    return torch.stack([part.sum() for part in torch.tensor(tiles).split(images.tolist())])
