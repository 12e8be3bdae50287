"""Pictures as RGB, and the paper's augmentation; resizing and normalising are the image processor's."""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

AREA = (0.5, 1.0)  # of a random crop; reconstructed: the paper says "random crop", LAVIS's recipes keep 50% or more
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """A random crop and a random mirror image.

    Args:
        random_crop: keep 50% to 100% of the area at a ratio of 3:4 to 4:3.
        horizontal_flip: mirror every second picture.
        views: how many ways of cropping and mirroring a picture has, which are its own and always the same, so that a
            feature cache can keep them; one of them is drawn each time. None: each time another one.
    Source: CROME, arXiv 2408.06610 ("random crop, horizontal flip"); the crop's bounds are reconstructed.
    """

    random_crop: bool = False
    horizontal_flip: bool = False
    views: int | None = None

    def __call__(self, image: Image.Image, draw: random.Random | None = None) -> Image.Image:
        """One picture in, one out, of the size of the crop.

        Args:
            draw: where chance comes from; None: Python's own `random`.
        """
        if not (self.random_crop or self.horizontal_flip):
            return image
        draw = draw if draw is not None else random.Random(random.getrandbits(64))
        if self.views is not None:
            draw = self._view(image, draw.randrange(self.views))
        if self.random_crop:
            image = image.crop(_box(draw, *image.size))
        if self.horizontal_flip and draw.random() < 0.5:
            image = ImageOps.mirror(image)
        return image

    def _view(self, image: Image.Image, number: int) -> random.Random:
        digest = hashlib.blake2b(image.tobytes(), digest_size=8)
        return random.Random(f"{digest.hexdigest()} {number}")


def _box(draw: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    area = width * height * draw.uniform(*AREA)
    ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    crop_width = min(width, max(1, round(math.sqrt(area * ratio))))
    crop_height = min(height, max(1, round(math.sqrt(area / ratio))))
    left, top = draw.randint(0, width - crop_width), draw.randint(0, height - crop_height)
    return left, top, left + crop_width, top + crop_height


def open_image(image: Any, name: str) -> Image.Image:
    """Read a picture as RGB, turned as its EXIF data say; of an animation the first frame.

    Args:
        image: a path, {"path", "bytes"} as `datasets` keeps pictures, or PIL's.
        name: what the message of an error begins with.
    Raises:
        ValueError: there is no such file, it is no picture, or it is damaged or larger than Pillow's limit against
            decompression bombs.
    """
    data = image.get("bytes") if isinstance(image, Mapping) else None
    path = image.get("path") if isinstance(image, Mapping) else image
    try:
        if isinstance(image, Image.Image):
            return _rgb(image)
        with Image.open(io.BytesIO(data) if data is not None else str(path)) as opened:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and opened.width * opened.height > limit:
                raise ValueError(f"{opened.width} x {opened.height} pixels; Pillow takes {limit:,}")
            return _rgb(opened)
    except Exception as error:  # each format's decoder has errors of its own
        cause = str(error) or type(error).__name__
        raise ValueError(
            f"{name}: cannot read the image {path} ({cause}). Replace the file or drop the row."
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats, and nobody knows what is white; save it with 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        values = np.asarray(image).astype(np.float32)
        # Of 32 bits ("I") nobody knows the white: 255, or that of 16 bits.
        if image.mode != "I" or values.max(initial=0) > 255:
            image = Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")
