"""Images of rows, and the paper's augmentation; resizing and normalizing are the image processor's."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from ..utils.read_image import read_image

AREA = (0.5, 1.0)  # of a random crop; reconstructed: the paper says "random crop", LAVIS's recipes keep 50% or more
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """A random crop and a random mirror image.

    Args:
        random_crop: keep 50% to 100% of the area at a ratio of 3:4 to 4:3.
        horizontal_flip: mirror every second image.
        views: how many ways of cropping and mirroring an image has, which are its own and always the same, so that a
            feature cache can keep them; one of them is drawn each time. None: each time another one.
    Source: CROME, arXiv 2408.06610 ("random crop, horizontal flip"); the crop's bounds are reconstructed.
    """

    random_crop: bool = False
    horizontal_flip: bool = False
    views: int | None = None

    def __call__(self, image: Image.Image, draw: random.Random | None = None) -> Image.Image:
        """One image in, one out, of the size of the crop.

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
    """Read an image of a row as `read_image` does, as the composite's processor reads it too.

    Args:
        image: a path, {"path", "bytes"} as `datasets` keeps images, or anything else that `read_image` takes.
        name: what the message of an error begins with.
    Raises:
        ValueError: there is no such file, it is not an image, or it is damaged or larger than Pillow's limit against
            decompression bombs.
    """
    try:
        return read_image(image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Replace the file or drop the row.") from error
