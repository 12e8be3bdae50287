"""Find the places of a branch's tokens: cells of an image, or words of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.vision_utils import get_vision_window_index

from ..tuner.guard import AUDIO_INPUTS
from .activity import BranchActivity

# model_type of hosts whose image tokens are a square grid of each of `pixel_values`, row by row. This list and the
# next two are tested by tests/inspection/test_places.py.
SQUARE = ("llava", "vipllava", "paligemma", "gemma3", "internvl", "aya_vision", "cohere2_vision")
# Hosts with rows and columns of patches in `image_grid_thw`, which merge squares of them to one token.
GRID_THW = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
WINDOWS = ("qwen2_5_vl",)  # those of GRID_THW whose merger reads window by window


@dataclass(frozen=True, eq=False)
class ImageMap:
    """One image, or the piece of it that the tower read, with the token of each cell of its grid.

    Attributes:
        image: the image as the tower saw it, if that is known, and otherwise as it was passed.
        cells: (rows, columns), the number of the token among those of the branch's activity.
    """

    image: Image.Image
    cells: torch.Tensor

    def values(self, of_tokens: torch.Tensor) -> np.ndarray:
        """Lay numbers of the activity's tokens out as the image: (rows, columns)."""
        return of_tokens[self.cells].numpy()


def map_images(
    model: nn.Module,
    batch: dict[str, Any],
    activity: BranchActivity,
    images: Sequence[Image.Image],
    processor: Any = None,
) -> list[ImageMap]:
    """Lay a branch's tokens over the images of a batch.

    Args:
        model: the model that `inspect_activity` ran.
        batch: the batch that it ran on.
        activity: the activity of the branch.
        images: the images that were passed, in their order.
        processor: the model's processor. With it, images are drawn as the tower saw them.
    Returns:
        A map for each image or piece. Empty if the grid of this host's tokens is unknown.
    """
    if activity.token_ids is not None or AUDIO_INPUTS.fullmatch(activity.branch):
        return []
    grids = _grids(model, batch, activity)
    seen = _as_seen(batch.get("pixel_values"), processor)
    if len(seen) != len(grids):
        seen = list(images)
    if len(seen) != len(grids):
        return []
    return [ImageMap(image, cells) for image, cells in zip(seen, grids, strict=True)]


def words(activity: BranchActivity, tokenizer: Any) -> list[tuple[str, int | None]]:
    """Return a branch's tokens as text with their numbers; gaps are "[16 image tokens]", without a number.

    Args:
        tokenizer: decodes the ids of a table; tokens of a site that reads no ids are named by their numbers.
    """
    if activity.token_ids is None:
        return [(str(number + 1), number) for number in range(len(activity.positions))]
    texts: list[tuple[str, int | None]] = []
    last = 0
    for number, position in enumerate(activity.positions.tolist()):
        if position > last:
            texts.append((f"[{position - last} image tokens]", None))
        texts.append((printable(tokenizer.decode([int(activity.token_ids[number])])), number))
        last = position + 1
    return texts


def printable(text: str) -> str:
    r"""Write out invisible characters of a text: a space as "·", a line's end as "↵", others as "\x00".

    Example:
        >>> printable(" a\n\u202e")
        '·a↵\\u202e'
    """
    shown = {" ": "·", "\n": "↵", "\t": "⇥"}
    return "".join(
        shown.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode("ascii")) for c in text
    )


def _grids(model: Any, batch: dict[str, Any], activity: BranchActivity) -> list[torch.Tensor]:
    """Return the token of each cell, (rows, columns) for each image."""
    config = model.config
    model_type, total = config.model_type, len(activity.gate)
    if model_type == "crome_vlm" and activity.site.endswith("vision_fusion"):
        return _composite(model, total)
    if model_type in GRID_THW and batch.get("image_grid_thw") is not None:
        return _merged(config.vision_config, batch["image_grid_thw"].cpu(), model_type in WINDOWS, total)
    pixels = batch.get("pixel_values")
    if model_type in SQUARE and isinstance(pixels, torch.Tensor) and pixels.ndim == 4:
        side = isqrt(total // len(pixels))
        return _rows([(side, side)] * len(pixels)) if side**2 * len(pixels) == total else []
    return []


def _rows(sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Number the cells row by row, one image after another."""
    grids, start = [], 0
    for rows, columns in sizes:
        grids.append(torch.arange(start, start + rows * columns).view(rows, columns))
        start += rows * columns
    return grids


def _composite(model: Any, total: int) -> list[torch.Tensor]:
    layout, pool = model.vision_layout, model.config.vision_pool_size
    rows, columns = layout.height // pool, layout.width // pool
    each = model.num_patch_tokens
    if total % each:
        return []
    prefix = each - rows * columns
    cells = torch.arange(rows * columns).view(rows, columns)
    return [cells + image * each + prefix for image in range(total // each)]


def _merged(vision: Any, sizes: torch.Tensor, windows: bool, total: int) -> list[torch.Tensor]:
    merge = vision.spatial_merge_size
    if (sizes[:, 0] != 1).any() or int(sizes.prod(-1).sum()) != total * merge**2:
        return []
    grids = _rows([(int(rows) // merge, int(columns) // merge) for _, rows, columns in sizes])
    if windows:
        index, _ = get_vision_window_index(sizes, merge, vision.window_size, vision.patch_size)
        place = torch.argsort(index)
        grids = [place[cells] for cells in grids]
    return grids


def _as_seen(pixels: Any, processor: Any) -> list[Image.Image]:
    """Rebuild the images that a tower read from the processor's output; empty if that is not an image."""
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None or not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        return []
    values = pixels.float().cpu()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            torch.tensor(getattr(image_processor, name)).view(1, -1, 1, 1) for name in ("image_mean", "image_std")
        )
        values = values * std + mean
    values = (values.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
    return [Image.fromarray(value.numpy()) for value in values]
