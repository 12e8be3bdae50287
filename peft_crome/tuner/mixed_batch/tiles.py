"""Count the tiles into which a model cuts images, for each image and for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiles_of_images(model: nn.Module, keywords: dict[str, Any]) -> list[int] | None:
    """Count the tiles of each image if its size determines them (LLaVA-NeXT and its relatives)."""
    config: Any = getattr(model, "config", None)
    pinpoints, sizes = getattr(config, "image_grid_pinpoints", None), keywords.get("image_sizes")
    if pinpoints is None or sizes is None:
        return None
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = [image_size_to_num_patches(size, pinpoints, config.vision_config.image_size) for size in sizes]
    images = keywords.get("batch_num_images")  # LLaVA-OneVision cuts an image only if it is alone in its row
    if images is not None:
        alone = [count == 1 for count in images.tolist() for _ in range(count)]
        tiles = [count if cut else 1 for count, cut in zip(tiles, alone, strict=True)]
    return tiles


def tiles_of_rows(is_image: torch.Tensor, tiles: list[int]) -> torch.Tensor | None:
    """Count the tiles of each row if text separates its images; None if it does not.

    Args:
        is_image: (rows, length).
        tiles: number of tiles of each image, in order.
    """
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    images = starts.sum(-1)
    if int(images.sum()) != len(tiles):
        return None
    return torch.stack([part.sum() for part in torch.tensor(tiles).split(images.tolist())])
