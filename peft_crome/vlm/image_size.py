"""Agree on one image size between a tower and its image processor, by probing the processor."""

import copy
from typing import Any

from PIL import Image


def fixed_image_size(image_processor: Any) -> tuple[int, int] | None:
    """Return height and width in pixels of an image processor's output for any image; None if they vary."""
    shapes = {_output_size(image_processor, shape) for shape in ((96, 160), (160, 96))}
    return shapes.pop() if len(shapes) == 1 else None


def with_image_size(image_processor: Any, height: int, width: int) -> Any:
    """Copy an image processor so that it makes height x width pixels of any image.

    Resizing and cropping keep their ratio if the processor does both (resize to 256, crop to 224).

    Raises:
        ValueError: the processor cannot be made to give this size, or cannot be saved.
    """
    _refuse_timm(image_processor)
    if fixed_image_size(image_processor) == (height, width):
        return image_processor
    exact = {"height": height, "width": width}
    for changes in (_keep_proportions(image_processor, height, width), {"size": exact, "crop_size": exact}):
        candidate = copy.deepcopy(image_processor)
        for name, value in changes.items():
            current = getattr(candidate, name, None)
            if current is not None:  # keep the processor's size class if it has one
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
    """Find changes that scale `size` as `crop_size` changes; none if the processor does not resize by an edge."""
    size, crop = getattr(image_processor, "size", None), getattr(image_processor, "crop_size", None)
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    if not edge:
        return {}
    crop = crop if getattr(image_processor, "do_center_crop", False) else None
    old = min(crop["height"], crop["width"]) if crop else edge
    changes = {"size": {"shortest_edge": round(edge * max(height, width) / old)}}
    return {**changes, "crop_size": {"height": height, "width": width}} if crop else changes


def _refuse_timm(image_processor: Any) -> None:
    """Refuse timm's processor: it is stored in its tower's config.json, so a composite's folder could not load it."""
    data_config = getattr(image_processor, "data_config", None)
    if data_config is None:
        return
    height, width = data_config["input_size"][-2:]
    edge = int(min(height, width) / data_config.get("crop_pct", 1.0))
    resample = Image.Resampling[data_config["interpolation"].upper()].value
    sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": height, "width": width}, "resample": resample}
    arguments = sizes | {"image_mean": list(data_config["mean"]), "image_std": list(data_config["std"])}
    raise ValueError(
        f"{type(image_processor).__name__} cannot be saved with a composite. Pass one that gives the same pixels, "
        f"vision=CLIPImageProcessor({', '.join(f'{name}={value}' for name, value in arguments.items())})."
    )


def _output_size(image_processor: Any, shape: tuple[int, int]) -> tuple[int, int]:
    image = Image.new("RGB", shape)  # a PIL image and "pt": timm's processor takes nothing else
    pixels = image_processor(image, return_tensors="pt")["pixel_values"]
    return tuple(pixels.shape[-2:])
