"""Open images of rows and augment them as in the paper. The image processor resizes and normalizes them."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import load_image

from ..utils.read_image import open_lazily, read_image

AREA = (0.5, 1.0)  # share of a random crop; reconstructed after LAVIS, which keeps 50% or more
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """A random crop and a random mirror image.

    Args:
        random_crop: keep 50% to 100% of the area at a ratio of 3:4 to 4:3.
        horizontal_flip: mirror every second image.
        views: number of crops and mirror images that each image has. They are always the same, so a feature cache can
            keep them, and one of them is drawn each time. None draws a new one each time.
    Source: CROME, arXiv 2408.06610 ("random crop, horizontal flip"); the crop's bounds are reconstructed.
    """

    random_crop: bool = False
    horizontal_flip: bool = False
    views: int | None = None

    def __call__(self, image: Image.Image, draw: random.Random | None = None) -> Image.Image:
        """Augment one image; the result has the size of the crop.

        Args:
            draw: source of randomness; None: Python's `random`.
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


def open_image(image: Any, name: str, processor: Any = None) -> Image.Image:
    """Read an image of a row as the model's processor reads its file.

    Args:
        image: a path, {"path", "bytes"} as `datasets` keeps images, or anything else that `read_image` takes.
        name: name of the image in error messages.
        processor: the model's processor. None stands for the composite's, or any that reads images with `read_image`.
    Raises:
        ValueError: the file does not exist, is not an image, or is damaged or larger than Pillow's limit against
            decompression bombs.
    """
    read = read_image if processor is None or getattr(processor, "reads_images", False) else _as_transformers
    try:
        return read(image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Replace the file or drop the row.") from error


def image_size(image: Any, name: str) -> tuple[int, int]:
    """Read width and height of the image as shown, from its header only.

    Raises:
        ValueError: as in `open_image`.
    """
    try:
        with open_lazily(image) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Replace the file or drop the row.") from error
    return (height, width) if turned else (width, height)


def _as_transformers(image: Any) -> Image.Image:
    """Read a path as transformers' processors do: drop transparency and keep the color below it."""
    with open_lazily(image) as opened:
        return load_image(opened)  # type: ignore[no-any-return]
