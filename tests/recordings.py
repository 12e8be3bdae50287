"""Write small videos, frames and sounds to files. The frames and samples within a file differ."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def write_video(path: Path, frames: int = 8, width: int = 96, height: int = 64, rate: int = 4) -> Path:
    """Write a video of moving noise with PyAV. The file's suffix decides the codec."""
    import av

    noise = torch.Generator().manual_seed(frames * width)
    pixels = torch.randint(0, 256, (height // 8, width // 8, 3), dtype=torch.uint8, generator=noise)
    pixels = pixels.repeat_interleave(8, 0).repeat_interleave(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            image = av.VideoFrame.from_ndarray(pixels.roll(8 * number, 1).numpy(), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: int = 4, width: int = 96, height: int = 64) -> list[Path]:
    """Write frames of one size to files and return their paths."""
    paths = [folder / f"frame{number}.png" for number in range(frames)]
    for number, path in enumerate(paths):
        Image.linear_gradient("L").rotate(20 * number).resize((width, height)).convert("RGB").save(path)
    return paths


def write_sound(path: Path, seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> Path:
    """Write a sound with a rising tone in each channel."""
    import soundfile

    time = torch.arange(int(seconds * rate)) / rate
    tones = [torch.sin(300 * (number + 1) * time * (1 + time)) for number in range(channels)]
    soundfile.write(path, torch.stack(tones, 1).numpy(), rate)
    return path
