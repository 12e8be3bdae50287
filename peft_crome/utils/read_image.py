"""Read an image in any form into the pixels that training and inference share."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the same httpx as transformers
from PIL import Image, ImageOps

from .shorten import cut, short

SOURCES = ("bytes", "path", "url", "base64")  # keys of a mapping that may hold the image
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{32,}={0,2}\s*")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")

Channels = Literal["channels_first", "channels_last"]


def read_image(image: Any, channels: Channels | None = None, timeout: float | None = None) -> Image.Image:
    """Return the RGB pixels of an image. The composite's processor, training and evaluation all use this function.

    - The EXIF orientation is applied. An animation gives its first frame; a PIL image gives its current frame.
    - Transparent pixels are drawn on white, as on a page; Qwen-VL and vLLM do the same. Dropping the alpha channel
      would show the hidden color of a transparent pixel, which is often black.
    - The higher 8 of 16 bits are kept, as Pillow does with 16-bit RGB files. White stays white.
    - If a type does not define white (32-bit integers, floats), the largest value does: floats up to 1 have
      white at 1, any values up to 255 at 255, integers up to 65,535 at 65,535.

    Args:
        image: a path, an http(s) or file address, a data URI, base64 text, bytes, an open file, a PIL image, {"bytes",
            "path", "url" or "base64"}, or an array or tensor of (height, width), (height, width, channels) or
            (channels, height, width) with 1 to 4 channels.
        channels: axis of an array's channels; None: determined by their number.
        timeout: seconds to wait for an address; None: no limit.
    Raises:
        ValueError: the file does not exist, is not an image or is damaged, its white is unknown, or it is larger
            than Pillow's limit against decompression bombs.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        with _naming(image):
            return _to_rgb(_from_array(image, channels))
    with open_lazily(image, timeout) as opened:
        return _to_rgb(opened)


@contextmanager
def open_lazily(image: Any, timeout: float | None = None) -> Iterator[Image.Image]:
    """Open an image and read its header. Its pixels are read when they are needed.

    Args:
        image, timeout: as in `read_image`, without arrays.
    Raises:
        ValueError: as in `read_image`; it may also be raised in the block.
    """
    with _naming(image):
        if isinstance(image, Image.Image):
            yield image
            return
        with Image.open(_file(image, timeout)) as opened:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and opened.width * opened.height > limit:
                raise ValueError(f"{opened.width} x {opened.height} pixels; Pillow takes {limit:,}")
            yield opened


@contextmanager
def _naming(image: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each format's decoder raises its own errors
        cause = str(error) or type(error).__name__
        raise ValueError(f"cannot read the image {_described(image)} ({cut(cause, 200)})") from error


def embedded_image(text: str) -> bytes | None:
    """Return the bytes of an image inside a text, a data URI or base64; None for a path or an address.

    Raises:
        ValueError: the base64 of a data URI is damaged.
    """
    if text[:5].lower() == "data:":
        return _of_data_uri(text)
    data = _of_base64(text)
    return data if data is not None and _looks_like_an_image(data) else None


def local_path(text: str) -> str:
    """Return the path in a file:// address; any other text is returned unchanged."""
    return url2pathname(urlsplit(text).path) if text[:7].lower() == "file://" else text


def _file(image: Any, timeout: float | None) -> Any:
    """Return a path or an open file for Pillow."""
    if isinstance(image, Mapping):
        source = next((image[key] for key in SOURCES if image.get(key) is not None), None)
        if source is None or isinstance(source, Mapping):
            raise ValueError(f"it has {sorted(map(str, image))}; expected one of {SOURCES}")
        return _file(source, timeout)
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    if hasattr(image, "read"):
        return image
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    if not isinstance(image, str):
        raise ValueError("expected a path, an address, bytes, base64 text, a PIL image, an array or a tensor")
    if image.startswith(("http://", "https://")):
        return io.BytesIO(httpx.get(image, timeout=timeout, follow_redirects=True).raise_for_status().content)
    image = local_path(image)
    if os.path.isfile(image):
        return image
    data = embedded_image(image)
    if data is None:
        raise ValueError("there is no such file, and the text is neither an http(s) address nor an image in base64")
    return io.BytesIO(data)


def _of_data_uri(text: str) -> bytes:
    head, _, body = text.partition(",")
    if not head.lower().replace(" ", "").endswith(";base64"):
        return unquote_to_bytes(body)
    data = _of_base64(unquote_to_bytes(body).decode("latin-1"))
    if data is None:
        raise ValueError("the base64 of the data URI is damaged")
    return data


def _of_base64(text: str) -> bytes | None:
    if not BASE64.fullmatch(text):
        return None
    digits = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4))
    except binascii.Error:
        return None


def _looks_like_an_image(data: bytes) -> bool:
    bitmap = data[:2] == b"BM" and data[6:10] == bytes(4)
    return bitmap or data.startswith(SIGNATURES) or data[4:8] == b"ftyp"


def _described(image: Any) -> str:
    if isinstance(image, Mapping):
        return _described(next((image[key] for key in ("path", *SOURCES) if image.get(key) is not None), None))
    if isinstance(image, Image.Image):
        return f"of {image.width} x {image.height} pixels, mode {image.mode}"
    if isinstance(image, np.ndarray | torch.Tensor):
        return f"of shape {tuple(image.shape)}, {image.dtype}"
    if isinstance(image, str | os.PathLike):
        return cut(os.fspath(image))
    return short(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    deep = image.mode == "I" and image.format == "PNG"  # 16 bits; an older Pillow has no other mode for them
    if image.format == "TIFF":
        image.load()  # rotates it; an older Pillow keeps the tag and would rotate twice
    else:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        key = image.info.get("transparency")
        values = np.asarray(image).astype(np.uint16) if deep else np.asarray(image)
        image = Image.fromarray(_eight_bits(values))
        if isinstance(key, int):
            image.putalpha(Image.fromarray((values != key).astype(np.uint8) * 255))
    palette = getattr(image.palette, "mode", "")
    if image.mode not in WITH_ALPHA and "transparency" not in image.info and not palette.endswith("A"):
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_array(array: Any, channels: Channels | None) -> Image.Image:
    if isinstance(array, torch.Tensor):
        tensor = array.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    if array.ndim == 3:
        array = np.moveaxis(array, 0, -1) if (channels or _channels(array.shape)) == "channels_first" else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (2,), (3,), (4,)):
        raise ValueError("expected (height, width), with 1 to 4 channels before or after them")
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array)))


def _channels(shape: tuple[int, ...]) -> Channels:
    """Find the channel axis by 1 or 3 channels, else by 4 or 2; the first axis has priority, as in transformers."""
    for counts in ((1, 3), (4,), (2,)):
        if shape[0] in counts:
            return "channels_first"
        if shape[-1] in counts:
            return "channels_last"
    return "channels_last"


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale values to 0 to 255; see `read_image` for the value of white."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    least, most = values.min(), values.max()
    floats = values.dtype.kind == "f"
    if not (least >= 0 and most <= (255 if floats else 65_535)):  # false for NaN
        raise ValueError(f"its values go from {least:.6g} to {most:.6g}, so its white is unknown; save it with 8 bits")
    if floats:
        return np.round(values.astype(np.float32) * (255 if most <= 1 else 1)).astype(np.uint8)
    return (values >> 8 if most > 255 else values).astype(np.uint8)
