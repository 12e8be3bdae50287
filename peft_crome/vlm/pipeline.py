"""Let transformers' pipeline pass images unread to a composite's processor."""

import functools
from typing import Any

from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from ..utils.read_image import read_image
from .processing_crome_vlm import CromeVLMProcessor


def read_images_of_pipelines() -> None:
    """Let the pipeline's call with `images` and `text` read a composite's images as training does; idempotent.

    The pipeline opens images before the processor sees them, drops transparency and clips 16-bit values at 255. In a
    chat it leaves them unread. Pipelines of other models are not changed.
    """
    preprocess = ImageTextToTextPipeline.preprocess
    if getattr(preprocess, "reads_as_training", False):
        return

    @functools.wraps(preprocess)
    def read_first(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, dict) and isinstance(self.processor, CromeVLMProcessor):
            inputs = {**inputs, "images": _read(inputs["images"], kwargs.get("timeout"))}
        return preprocess(self, inputs, *args, **kwargs)

    read_first.reads_as_training = True  # type: ignore[attr-defined]
    ImageTextToTextPipeline.preprocess = read_first


def _read(images: Any, timeout: float | None) -> Any:
    if isinstance(images, list | tuple):
        return [_read(image, timeout) for image in images]
    return read_image(images, timeout=timeout)
