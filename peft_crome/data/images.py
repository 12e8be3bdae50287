"""Augmentation of training pictures as the paper has it; resizing and normalising are the image processor's."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageOps

AREA = (0.5, 1.0)  # of a random crop; reconstructed: the paper says "random crop", LAVIS's recipes keep 50% or more
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """A random crop and a random mirror image, drawn from Python's `random`, whose state Trainer's checkpoints keep.

    Args:
        random_crop: keep 50% to 100% of the area at a ratio of 3:4 to 4:3.
        horizontal_flip: mirror every second picture.
    Source: CROME, arXiv 2408.06610 ("random crop, horizontal flip"); the crop's bounds are reconstructed.
    """

    random_crop: bool = False
    horizontal_flip: bool = False

    def __call__(self, image: Image.Image) -> Image.Image:
        """One picture in, one out, of the size of the crop."""
        if self.random_crop:
            image = image.crop(_box(*image.size))
        if self.horizontal_flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        return image


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    area = width * height * random.uniform(*AREA)
    ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    crop_width = min(width, max(1, round(math.sqrt(area * ratio))))
    crop_height = min(height, max(1, round(math.sqrt(area / ratio))))
    left, top = random.randint(0, width - crop_width), random.randint(0, height - crop_height)
    return left, top, left + crop_width, top + crop_height
