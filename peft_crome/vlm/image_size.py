"""Agree on one image size between a tower and its image processor, by what the processor does."""

import copy
from typing import Any

import numpy as np


def fixed_image_size(image_processor: Any) -> tuple[int, int] | None:
    """Height and width in pixels that an image processor makes of any picture; None where they vary."""
    shapes = {_output_size(image_processor, shape) for shape in ((96, 160), (160, 96))}
    return shapes.pop() if len(shapes) == 1 else None


def with_image_size(image_processor: Any, height: int, width: int) -> Any:
    """A copy of the image processor that makes height x width pixels of any picture.

    Resizing and cropping keep their proportions where the processor does both (resize to 256, crop to 224).

    Raises:
        ValueError: the processor cannot be made to give this size.
    """
    if fixed_image_size(image_processor) == (height, width):
        return image_processor
    exact = {"height": height, "width": width}
    for changes in (_keep_proportions(image_processor, height, width), {"size": exact, "crop_size": exact}):
        candidate = copy.deepcopy(image_processor)
        for name, value in changes.items():
            current = getattr(candidate, name, None)
            if current is not None:  # the processor's own size class, where it has one
                setattr(candidate, name, type(current)(**value) if not isinstance(current, int) else value)
        try:
            if fixed_image_size(candidate) == (height, width):
                return candidate
        except ValueError:
            continue  # this processor refuses such a size entry; the next form may do
    raise ValueError(
        f"{type(image_processor).__name__} with size={getattr(image_processor, 'size', None)} cannot be made to give "
        f"{height} x {width} pixels. Pass an image processor object that does as vision=."
    )


def _keep_proportions(image_processor: Any, height: int, width: int) -> dict[str, dict[str, int]]:
    """Changes that scale `size` as `crop_size` changes; none where the processor does not resize by an edge."""
    size, crop = getattr(image_processor, "size", None), getattr(image_processor, "crop_size", None)
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    if not edge:
        return {}
    crop = crop if getattr(image_processor, "do_center_crop", False) else None
    old = min(crop["height"], crop["width"]) if crop else edge
    changes = {"size": {"shortest_edge": round(edge * max(height, width) / old)}}
    return {**changes, "crop_size": {"height": height, "width": width}} if crop else changes


def _output_size(image_processor: Any, shape: tuple[int, int]) -> tuple[int, int]:
    picture = np.zeros((*shape, 3), dtype=np.uint8)
    pixels = image_processor(picture, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    return tuple(np.asarray(pixels).shape[-2:])
