"""Decode videos of rows as transformers does, and read frames in files as images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from transformers.utils import import_utils
from transformers.video_utils import VIDEO_DECODERS, VideoMetadata

from ..utils.extras import missing
from .images import image_size, open_image
from .media import file_of, naming

Sampler = Callable[[VideoMetadata], Any]


class Stopped(Exception):
    """Raised to stop reading a file once what is asked for is known."""


def frames_of(video: Any) -> Sequence[Any] | None:
    """Return the image files of a video; None: it is a single file."""
    return (video.get("frames") or None) if isinstance(video, Mapping) else None


def read_video(video: Any, name: str, sampler: Sampler, processor: Any = None) -> tuple[Any, VideoMetadata]:
    """Decode the frames of a video that a processor chooses.

    Args:
        video: a path, {"path", "bytes"}, or {"frames": images}, all of which are read.
        name: beginning of an error message.
        sampler: function from a file's metadata to the numbers of the frames to decode.
        processor: the model's processor, as in `open_image`.
    Returns:
        RGB frames, (frames, height, width, 3) or from torchcodec (frames, 3, height, width), uint8; and the metadata
        of the video.
    Raises:
        ValueError: the file is missing, is not a video, has no frames, is truncated, or its frames differ in size.
        ImportError: no package that decodes videos is installed.
    """
    files = frames_of(video)
    if files is not None:
        images = [np.asarray(open_image(file, name, processor)) for file in files]
        if len({image.shape for image in images}) > 1:
            sizes = sorted({f"{image.shape[1]} x {image.shape[0]}" for image in images})
            raise ValueError(f"{name}: the frames of a video are {', '.join(sizes)} pixels large. Write one size.")
        return np.stack(images), _of_frames(len(images), images[0].shape[1], images[0].shape[0])
    wanted: list[np.ndarray] = []

    def choose(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        wanted.append(np.asarray(sampler(_counted(metadata, video))))
        return np.unique(wanted[0])

    with naming(name, "video", video):
        frames, metadata = _decoder()(file_of(video), choose)
        distinct, places = np.unique(wanted[0], return_inverse=True)
        if len(frames) < len(distinct):
            raise ValueError(
                f"{len(frames)} of the {len(distinct)} frames that are read can be decoded; it is cut off"
            )
        metadata.frames_indices = wanted[0]
        return frames[places], metadata


def video_header(video: Any, name: str) -> VideoMetadata:
    """Read size, number of frames and frames a second of a video without decoding a frame.

    Raises:
        ValueError, ImportError: as in `read_video`; a truncated file is not detected.
    """
    files = frames_of(video)
    if files is not None:
        return _of_frames(len(files), *image_size(files[0], name))
    headers = []

    def stop(metadata: VideoMetadata, **_: Any) -> None:
        headers.append(_counted(metadata, video))
        raise Stopped

    with naming(name, "video", video), suppress(Stopped):
        _decoder()(file_of(video), stop)  # asks for the frames before it decodes one
    return headers[0]


def first_frame(metadata: VideoMetadata) -> list[int]:
    """Choose the first frame alone, as a sampler."""
    return [0]


def _of_frames(count: int, width: int, height: int) -> VideoMetadata:
    return VideoMetadata(total_num_frames=count, width=width, height=height, frames_indices=np.arange(count))  # type: ignore[arg-type]


def _decoder() -> Callable[..., Any]:
    usable = getattr(import_utils, "is_torchcodec_usable", None)
    if usable is not None and usable(decode="video"):
        return VIDEO_DECODERS["torchcodec"]  # type: ignore[no-any-return]
    if import_utils.is_av_available():
        return VIDEO_DECODERS["pyav"]  # type: ignore[no-any-return]
    raise missing("media", "av", "Reading a video")


def _counted(metadata: VideoMetadata, video: Any) -> VideoMetadata:
    """Add the number of frames, which WebM and Matroska do not store, to the header, by counting packets."""
    if not metadata.total_num_frames and metadata.video_backend == "pyav":
        import av

        with av.open(file_of(video)) as container:
            metadata.total_num_frames = sum(packet.size > 0 for packet in container.demux(video=0))
        metadata.duration = metadata.total_num_frames / metadata.fps if metadata.fps else None
    if not metadata.total_num_frames:
        raise ValueError("it has no frames")
    return metadata
