"""Decode sounds of rows as transformers does, at the sampling rate of the model."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from transformers.audio_utils import load_audio

from ..utils.extras import missing
from .media import file_of, naming


def read_sound(sound: Any, name: str, sampling_rate: int) -> np.ndarray:
    """Decode a sound as one channel.

    Args:
        sound: a path, or {"path", "bytes"}.
        name: beginning of an error message.
        sampling_rate: samples a second to resample to.
    Returns:
        (samples,), float32.
    Raises:
        ValueError: the file is missing, is not a sound, or has no samples.
        ImportError: no package that decodes sound is installed.
    """
    with naming(name, "audio", sound):
        file = file_of(sound)
        source = base64.b64encode(file.getvalue()).decode() if isinstance(file, io.BytesIO) else file
        try:
            samples = load_audio(source, sampling_rate=sampling_rate)
        except ImportError as error:
            raise missing("media", "soundfile", "Reading a sound") from error
        if not len(samples):
            raise ValueError("it has no samples")
        return samples  # type: ignore[no-any-return]


def sound_header(sound: Any, name: str) -> tuple[int, int]:
    """Return a sound's number of samples and its sampling rate, from its header alone if soundfile reads the file.

    Raises:
        ValueError, ImportError: as in `read_sound`.
    """
    try:
        import soundfile
    except ImportError as error:
        raise missing("media", "soundfile", "Reading a sound") from error
    try:
        with naming(name, "audio", sound):
            info = soundfile.info(file_of(sound))
        samples, rate = info.frames, info.samplerate
    except ValueError:
        samples, rate = 0, 16_000  # a format that only torchcodec reads
    return samples or len(read_sound(sound, name, rate)), rate


def resampled(samples: int, rate: int, sampling_rate: int) -> int:
    """Return the number of samples that `read_sound` makes of a sound with this header."""
    return math.ceil(samples * sampling_rate / rate)
