"""Read a row's images, videos and sounds as the model's processor would, or only their headers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from ..utils.shorten import short
from .images import image_size, open_image
from .media import media_of
from .processed import AS_RENDERED, RENDERED
from .sounds import read_sound, resampled, sound_header
from .taken import sound_processor
from .videos import Sampler, Stopped, read_video, video_header

Header = tuple[str, tuple[Any, ...]]  # kind of a medium, and the values that determine its number of tokens
EXAMPLES: dict[str, Header] = {
    "image": ("image", (64, 64)),  # width and height
    "video": ("video", (64, 64, 16, 8.0, 2.0)),  # width, height, frames, frames a second, seconds
    "audio": ("audio", (16_000,)),  # samples
}


class MediaReader:
    """Read the media of rows for one processor.

    Args:
        processor: the model's processor; it is not changed.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def read(
        self, row: Mapping[str, Any], augmentation: Callable[[Image.Image], Image.Image] | None = None
    ) -> dict[str, Iterator[dict[str, Any]]]:
        """Read the entries for the parts of a row's messages, by kind. Each medium is decoded when it is requested.

        Args:
            augmentation: augmentation of images.
        """
        name = f"Row {short(row['id'])}"
        return {kind: self._read(kind, media, name, augmentation) for kind, media in media_of(row).items()}

    def header(self, kind: str, medium: Any, name: str) -> Header:
        """Read the values that determine a medium's number of tokens, without decoding it.

        Raises:
            ValueError: the medium cannot be read; the message begins with `name`.
        """
        if kind == "image":
            return kind, image_size(medium, name)
        if kind == "audio":
            return kind, (resampled(*sound_header(medium, name), self._sampling_rate),)
        metadata = video_header(medium, name)
        return kind, (metadata.width, metadata.height, metadata.total_num_frames, metadata.fps, metadata.duration)

    def blank(self, header: Header) -> dict[str, Any]:
        """Make a part with a blank medium of this header, which has as many tokens as any other of that header."""
        kind, numbers = header
        if kind == "image":
            return {"type": kind, kind: Image.new("RGB", numbers)}
        if kind == "audio":
            return {"type": kind, kind: np.linspace(-1, 1, *numbers, dtype=np.float32)}
        width, height, frames, rate, seconds = numbers
        metadata = VideoMetadata(total_num_frames=frames, fps=rate, width=width, height=height, duration=seconds)
        chosen = np.arange(frames) if rate is None else np.asarray(self._sampler(metadata))
        metadata.frames_indices = chosen  # type: ignore[assignment]
        return {"type": kind, kind: np.zeros((len(chosen), height, width, 3), np.uint8), "metadata": metadata}

    def _read(
        self, kind: str, media: list[Any], name: str, augmentation: Callable[[Image.Image], Image.Image] | None
    ) -> Iterator[dict[str, Any]]:
        for medium in media:
            if kind == "image":
                image = open_image(medium, name, self.processor)
                yield {kind: augmentation(image) if augmentation is not None else image}
            elif kind == "audio":
                yield {kind: read_sound(medium, name, self._sampling_rate)}
            else:
                frames, metadata = read_video(medium, name, self._sampler, self.processor)
                yield {kind: frames, "metadata": metadata}

    @cached_property
    def _sampling_rate(self) -> int:
        return int(sound_processor(self.processor).sampling_rate)

    @cached_property
    def _sampler(self) -> Sampler:
        """The processor's way to choose frames, found by giving it a file, since settings are in several places."""
        asked: list[Sampler | None] = []

        def fetch_videos(videos: Any, sample_indices_fn: Sampler | None = None) -> None:
            asked.append(sample_indices_fn)
            raise Stopped

        processor = copy.copy(self.processor)
        processor.video_processor = copy.copy(processor.video_processor)
        processor.video_processor.fetch_videos = fetch_videos
        shown = {"type": "video", "video": "video.mp4"}
        message = {"role": "user", "content": [shown], RENDERED: getattr(processor, "video_token", "")}
        with suppress(Stopped):
            processor.apply_chat_template([[message]], chat_template=AS_RENDERED, tokenize=True, return_dict=True)
        sampler: Callable[..., Any] = asked[0] or default_sample_indices_fn
        return lambda metadata: sampler(metadata=metadata)
