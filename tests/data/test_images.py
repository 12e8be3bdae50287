"""Test that images of common kinds are read, and that damaged ones are refused by row."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from peft_crome.data import open_image


def save(image: Image.Image, path: Path, **arguments: Any) -> str:
    image.save(path, **arguments)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", "jpg"), ("L", "png"), ("LA", "png"), ("P", "gif"), ("1", "png"), ("RGBA", "webp")],
)
def test_modes_become_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    image = open_image(save(Image.new(mode, (5, 4)), tmp_path / f"{mode}.{suffix}"), "x")
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    """Images of 16 bits keep their shades. Pillow alone would make everything above 255 white."""
    shades = np.linspace(0, 65_535, 16, dtype=np.uint16).reshape(4, 4)
    image = open_image(save(Image.fromarray(shades), tmp_path / "deep.png"), "x")
    assert np.asarray(image)[..., 0].flatten().tolist() == [17 * i for i in range(16)]


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a file"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_dark_images_of_sixteen_bits_stay_dark(mode: str, stored: bool, tmp_path: Path) -> None:
    """Dark images of 16 bits stay dark, because their highest shade does not show how many bits they have."""
    shades = np.full((4, 4), 200, dtype="<u2" if mode == "I;16" else ">u2")
    dark = Image.frombytes(mode, (4, 4), shades.tobytes())
    image = save(dark, tmp_path / "dark.tif") if stored else dark
    assert open_image(image, "x").getextrema() == ((0, 0),) * 3


def test_dark_images_of_thirty_two_bits_keep_their_shades() -> None:
    """Dark images of 32 bits keep their shades, because the number of bits that they use is unknown."""
    assert open_image(Image.new("I", (4, 4), 200), "x").getextrema() == ((200, 200),) * 3


def test_animations_give_their_first_frame_and_cameras_their_turn(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path, "x").getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(save(Image.new("RGB", (30, 60)), tmp_path / "turned.jpg", exif=exif), "x").size == (60, 30)


def test_images_in_memory(tmp_path: Path) -> None:
    stored = io.BytesIO()
    Image.new("L", (3, 2), 7).save(stored, "PNG")
    assert open_image({"bytes": stored.getvalue(), "path": None}, "x").getpixel((0, 0)) == (7, 7, 7)
    assert open_image({"bytes": None, "path": save(Image.new("L", (3, 2)), tmp_path / "a.png")}, "x").size == (3, 2)
    assert open_image(Image.new("L", (3, 2)), "x").mode == "RGB"


def bomb() -> bytes:
    """Return a PNG whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def truncated() -> bytes:
    stored = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stored, "PNG")
    return stored.getvalue()[:-1500]


def floats() -> bytes:
    stored = io.BytesIO()
    Image.new("F", (4, 4), 500.5).save(stored, "TIFF")
    return stored.getvalue()


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a file"])
@pytest.mark.parametrize(
    "data",
    [b"", b"no image", bomb(), truncated(), floats()],
    ids=["empty", "words", "bomb", "truncated", "floats"],
)
def test_damaged_images_name_the_row(data: bytes, stored: bool, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(data)
    image = str(tmp_path / "bad.jpg") if stored else {"bytes": data, "path": "bad.jpg"}
    with pytest.raises(ValueError, match=r"^Row 'r': cannot read the image .*bad.jpg \(.+\). Replace the file or"):
        open_image(image, "Row 'r'")


def test_missing_images_name_the_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Row 'r': cannot read the image .*missing.jpg"):
        open_image(str(tmp_path / "missing.jpg"), "Row 'r'")


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    place=st.floats(0, 1),
    change=st.one_of(st.just(b""), st.binary(min_size=1, max_size=40)),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("default")  # Pillow's about damaged files
def test_whatever_is_damaged_is_an_image_or_names_the_row(kind: str, place: float, change: bytes) -> None:
    stored = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(stored, kind)
    data = stored.getvalue()
    at = int(place * len(data))
    damaged = data[:at] + change + (data[at + len(change) :] if change else b"")
    try:
        image = open_image({"bytes": damaged, "path": None}, "Row 'r'")
    except ValueError as error:
        said = str(error)
    else:
        said = image.mode
    assert said == "RGB" or said.startswith("Row 'r': cannot read the image")
