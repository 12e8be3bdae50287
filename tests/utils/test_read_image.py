"""Test that an image in any form has the same pixels in training, evaluation and inference."""

import base64
import functools
import io
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from peft_crome.data import ConversationCollator
from peft_crome.training import generate_answers
from peft_crome.utils.read_image import embedded_image, read_image
from peft_crome.vlm.pipeline import read_images_of_pipelines

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLORS = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 90)], axis=-1)
ALPHA = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) * np.ones((6, 1), dtype=np.uint8)
ON_WHITE = np.where(ALPHA[..., None] == 0, 255, COLORS)
DEEP = RAMP.astype(np.uint16) * 256 + 77


def stored(image: Image.Image, kind: str, **arguments: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return file.getvalue()


def gray(shades: np.ndarray) -> np.ndarray:
    return np.repeat(shades[..., None], 3, axis=-1)


def with_alpha(colors: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate([colors, ALPHA[..., None]], axis=-1))


def rotated(kind: str) -> bytes:
    """Return a file of `COLORS` as a turned camera stores it: rotated, with the orientation in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    arguments = {
        "WEBP": {"lossless": True, "exif": exif}, "JPEG": {"quality": 100, "subsampling": 0, "exif": exif},
        "PNG": {"exif": exif}, "TIFF": {"tiffinfo": {0x0112: 6}},
    }[kind]  # fmt: skip
    return stored(Image.fromarray(COLORS).transpose(Image.Transpose.ROTATE_90), kind, **arguments)


def png_of_16_bits(values: np.ndarray, color: int, transparent: bytes = b"") -> bytes:
    """Return a PNG that Pillow cannot write. It has 16 bits a channel, with several channels or a transparent
    color."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(RAMP), Image.new("L", (8, 6), 200)]
    arguments = {"lossless": True} if kind == "WEBP" else {}
    return stored(frames[0], kind, save_all=True, append_images=frames[1:], **arguments)


def palette(transparency: Any) -> bytes:
    """Return a PNG of four colors in stripes of two columns, with a palette and this transparency."""
    image = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8), 2)[None].repeat(6, axis=0))
    image.putpalette([200, 10, 20, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return stored(image, "PNG", transparency=transparency)


STRIPES = np.array([[255, 255, 255], [0, 255, 0], [0, 0, 255], [9, 9, 9]], dtype=np.uint8).repeat(2, axis=0)[None]
FADED = STRIPES.copy()
FADED[0, :2] = [200 * 0.5 + 255 * 0.5, 10 * 0.5 + 255 * 0.5, 20 * 0.5 + 255 * 0.5]
CMYK = Image.fromarray(np.stack([RAMP, RAMP // 2, RAMP // 3, RAMP // 4], axis=-1), "CMYK")
FILES: dict[str, tuple[bytes, np.ndarray, int]] = {  # name -> file, its pixels, largest difference
    "RGB": (stored(Image.fromarray(COLORS), "PNG"), COLORS, 0),
    "RGBA": (stored(with_alpha(COLORS), "PNG"), ON_WHITE, 0),
    "RGBA WebP": (stored(with_alpha(COLORS), "WEBP", lossless=True, exact=True), ON_WHITE, 0),
    "RGBA TIFF": (stored(with_alpha(COLORS), "TIFF"), ON_WHITE, 0),
    "LA": (
        stored(Image.fromarray(np.stack([RAMP, ALPHA], axis=-1)), "PNG"),
        np.where(ALPHA[..., None] == 0, 255, gray(RAMP)),
        0,
    ),
    "transparent color": (
        stored(Image.fromarray(COLORS), "PNG", transparency=(0, 235, 90)),
        np.where((COLORS == [0, 235, 90]).all(axis=-1, keepdims=True), 255, COLORS),
        0,
    ),
    "palette, transparent": (palette(0), STRIPES.repeat(6, axis=0), 0),
    "palette, half transparent": (palette(bytes([128, 255, 255, 255])), FADED.repeat(6, axis=0), 2),
    "1 bit": (stored(Image.fromarray(RAMP > 100), "PNG"), gray((RAMP > 100).astype(np.uint8) * 255), 0),
    "CMYK": (stored(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB")), 0),
    "16 bits": (stored(Image.fromarray(DEEP), "PNG"), gray(RAMP), 0),
    "16 bits, dark": (stored(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), gray(np.zeros_like(RAMP)), 0),
    "16 bits, transparent": (png_of_16_bits(DEEP, 0, struct.pack(">H", 77)), gray(np.where(RAMP == 0, 255, RAMP)), 0),
    "16 bits TIFF": (stored(Image.fromarray(DEEP), "TIFF"), gray(RAMP), 0),
    "16 bits RGB": (png_of_16_bits(COLORS.astype(np.uint16) * 256 + 77, 2), COLORS, 0),
    "16 bits RGBA": (
        png_of_16_bits(np.concatenate([COLORS, ALPHA[..., None]], axis=-1).astype(np.uint16) * 257, 6),
        ON_WHITE,
        0,
    ),
    "32 bits": (stored(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), gray(RAMP), 0),
    "floats to 1": (stored(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), gray(RAMP), 0),
    "floats to 255": (stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), gray(RAMP), 0),
    "GIF": (animation("GIF"), gray(RAMP), 0),
    "APNG": (animation("PNG"), gray(RAMP), 0),
    "animated WebP": (animation("WEBP"), gray(RAMP), 0),
    "EXIF, JPEG": (rotated("JPEG"), COLORS, 4),
    **{f"EXIF, {kind}": (rotated(kind), COLORS, 0) for kind in ("PNG", "WEBP", "TIFF")},
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_files(name: str) -> None:
    data, pixels, tolerance = FILES[name]
    found = np.asarray(read_image(data)).astype(int)
    assert found.shape == pixels.shape
    assert np.abs(found - pixels).max() <= tolerance


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", FILES)
def test_training_evaluation_and_inference_read_alike(
    name: str,
    composite: Any,
    processor: Any,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, pixels, _ = FILES[name]
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    row = {"id": "r", "images": [str(path)], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w2"}]},
    ]}  # fmt: skip
    expected = processor.image_processor(read_image(data), return_tensors="pt")["pixel_values"]
    plain = processor.image_processor(Image.fromarray(pixels.astype(np.uint8)), return_tensors="pt")["pixel_values"]
    assert (expected - plain).abs().max() < 0.25

    seen = {"training": ConversationCollator(processor)([row])["pixel_values"]}
    given: list[Any] = []

    def generate(**batch: Any) -> torch.Tensor:
        given.append(batch["pixel_values"])
        return batch["input_ids"]

    monkeypatch.setattr(composite, "generate", generate)
    generate_answers(composite, processor, [row], progress=False)
    seen["evaluation"] = given.pop()
    pipe = pipeline("image-text-to-text", model=composite, processor=processor)

    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    with Image.open(path) as opened:
        opened.load()
    forms = {
        "path": str(path), "Path": path, "PIL": opened, "bytes": data, "datasets": {"bytes": data, "path": None},
        "datasets path": {"bytes": None, "path": str(path)}, "data URI": uri, "base64": uri.partition(",")[2],
        "file": io.BytesIO(data), "address": f"{address}/image.bin", "file address": path.as_uri(),
        "datasets decoded": datasets.Image().decode_example({"bytes": data, "path": None}),
    }  # fmt: skip
    if name == "EXIF, TIFF":
        del forms["datasets decoded"]  # which turns it twice with Pillow 10.0
    said = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for form, image in forms.items():
        seen[f"processor, {form}"] = processor(images=[image], text="<image> w1", return_tensors="pt")["pixel_values"]
        for key in ("image", "url", "path", "base64"):
            if form == "file":
                image.seek(0)
            messages = [{"role": "user", "content": [{"type": "image", key: image}, {"type": "text", "text": "w1"}]}]
            seen[f"chat, {form}, {key}"] = processor.apply_chat_template(messages, **said)["pixel_values"]
        if form in ("path", "PIL", "data URI", "address"):  # what transformers' pipeline takes
            pipe(images=image, text="<image> w1", max_new_tokens=1)
            seen[f"pipeline, {form}"] = given.pop()
            pipe(images=[image], text=["<image> w1"], max_new_tokens=1)
            seen[f"pipeline, list, {form}"] = given.pop()
            pipe(text=messages, max_new_tokens=1)
            seen[f"pipeline, chat, {form}"] = given.pop()
    messages[0]["content"][0] = {"type": "image_url", "image_url": {"url": uri}}
    seen["chat, OpenAI"] = processor.apply_chat_template(messages, **said)["pixel_values"]
    different = {
        way: (found - expected).abs().max().item() for way, found in seen.items() if not found.equal(expected)
    }
    assert not different


ARRAYS: dict[str, tuple[Any, np.ndarray]] = {
    "numpy": (COLORS, COLORS),
    "numpy, channels first": (COLORS.transpose(2, 0, 1), COLORS),
    "torch": (torch.from_numpy(COLORS).permute(2, 0, 1), COLORS),
    "torch, floats": (torch.from_numpy(COLORS).permute(2, 0, 1) / 255, COLORS),
    "torch, bfloat16": (torch.from_numpy(COLORS // 255 * 255).permute(2, 0, 1).bfloat16() / 255, COLORS // 255 * 255),
    "floats to 255": (COLORS.astype(np.float64), COLORS),
    "half floats": ((COLORS / 255).astype(np.float16), COLORS),
    "integers": (COLORS.astype(np.int64), COLORS),
    "16 bits": (COLORS.astype(np.uint16) * 256 + 200, COLORS),
    "32 bits of 16": (torch.from_numpy(COLORS.astype(np.int32) * 256 + 200).permute(2, 0, 1), COLORS),
    "a batch of one": (torch.from_numpy(COLORS).permute(2, 0, 1)[None], COLORS),
    "not contiguous": (COLORS[::-1], COLORS[::-1]),
    "booleans": (RAMP > 100, gray((RAMP > 100).astype(np.uint8) * 255)),
    "gray": (RAMP, gray(RAMP)),
    "gray, one channel": (torch.from_numpy(RAMP)[None], gray(RAMP)),
    "gray and alpha": (np.stack([RAMP, ALPHA]), np.where(ALPHA[..., None] == 0, 255, gray(RAMP))),
    "RGBA": (np.asarray(with_alpha(COLORS)), ON_WHITE),
    "RGBA, channels first": (torch.from_numpy(np.asarray(with_alpha(COLORS)).transpose(2, 0, 1).copy()), ON_WHITE),
    "RGBA, floats": (np.asarray(with_alpha(COLORS)) / 255, ON_WHITE),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_tensors_are_read_as_the_image_they_hold(name: str) -> None:
    array, pixels = ARRAYS[name]
    assert np.array_equal(read_image(array), pixels)


@pytest.mark.parametrize(
    "listed",
    [lambda array: array, lambda array: [array], lambda array: [[array]]],
    ids=["alone", "in a list", "in a list of lists"],
)
@pytest.mark.parametrize("name", ARRAYS)
def test_processors_read_arrays_and_tensors_alone_and_in_lists(name: str, listed: Any, processor: Any) -> None:
    array, pixels = ARRAYS[name]
    expected = processor.image_processor(Image.fromarray(pixels.astype(np.uint8)), return_tensors="pt")["pixel_values"]
    found = processor(images=listed(array), text="<image> w1", return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)


AS_SETTINGS = pytest.mark.parametrize(
    "as_settings",
    [lambda settings: settings, lambda settings: {"images_kwargs": settings}],
    ids=["by itself", "in images_kwargs"],
)


@AS_SETTINGS
def test_prepared_arrays_are_left_to_the_caller(as_settings: Any, processor: Any) -> None:
    floats = torch.from_numpy(COLORS).permute(2, 0, 1) / 255
    expected = processor.image_processor(floats, do_rescale=False, return_tensors="pt")["pixel_values"]
    settings = as_settings({"do_rescale": False})
    found = processor(images=floats, text="<image>", return_tensors="pt", **settings)["pixel_values"]
    assert torch.equal(found, expected)


@AS_SETTINGS
@pytest.mark.parametrize("channels", ["channels_last", "channels_first"])
def test_named_channels_are_left_to_the_caller(channels: str, as_settings: Any, processor: Any) -> None:
    tall = np.arange(3 * 8 * 3, dtype=np.uint8).reshape(3, 8, 3) * 3  # its channels cannot be found by their number
    image = tall if channels == "channels_last" else tall.transpose(1, 2, 0)
    expected = processor.image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    settings = as_settings({"input_data_format": channels})
    found = processor(images=tall, text="<image>", return_tensors="pt", **settings)["pixel_values"]
    assert torch.equal(found, expected)


UNREADABLE = pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4), -1.0), "values go from -1 to -1, so its white is unknown"),
        (np.full((4, 4), np.nan), "its white is unknown"),
        (np.full((4, 4, 3), 300.0), "values go from 300 to 300"),
        (Image.new("I", (4, 4), 70_000), "mode I .*values go from 70000 to 70000"),
        (Image.new("F", (4, 4), 1e6), r"mode F .*values go from 1e\+06 to 1e\+06"),
        (np.zeros((6, 6, 5), np.uint8), r"of shape \(6, 6, 5\), uint8 \(expected \(height, width\)"),
        ("missing.png", r"cannot read the image missing.png \(there is no such file"),
        ("data:image/png;base64,!!!!", "the base64 of the data URI is damaged"),
        ("data:image/svg+xml,%3Csvg/%3E", "cannot identify image file"),
        ({"width": 3}, r"it has \['width'\]; expected one of"),
        (3, "expected a path, an address, bytes, base64 text"),
    ],
)


@UNREADABLE
def test_what_cannot_be_read_is_named(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(image)


@UNREADABLE
def test_processors_name_what_cannot_be_read(image: Any, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=[image], text="<image>")


LARGE = base64.b64encode(bytes(100_000)).decode()


@pytest.mark.parametrize(
    "image",
    [LARGE, "data:image/png;base64," + LARGE, LARGE.encode(), {"path": LARGE + ".", "bytes": None}],
    ids=["base64", "data URI", "bytes", "path"],
)
def test_large_values_are_shortened_in_messages(image: Any) -> None:
    with pytest.raises(ValueError, match="cannot read the image") as error:
        read_image(image)
    assert len(str(error.value)) < 400


IN_TEXT = FILES["RGB"][0]
BASE64 = base64.b64encode(IN_TEXT).decode()
WRAPPED = base64.encodebytes(IN_TEXT).decode()
EMBEDDED = {
    "base64": BASE64,
    "base64 in lines": WRAPPED,
    "base64 for addresses": base64.urlsafe_b64encode(IN_TEXT).decode().rstrip("="),
    "data URI": f"data:image/png;base64,{BASE64}",
    "data URI in lines": f"DATA:;base64,{WRAPPED}",
    "data URI in percents": "data:image/png," + "".join(f"%{byte:02x}" for byte in IN_TEXT),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_images_that_a_text_holds(name: str) -> None:
    assert embedded_image(EMBEDDED[name]) == IN_TEXT


@pytest.mark.parametrize(
    "text",
    ["a.png", "folder/" * 20, "http://x/a.png", "/" + "a" * 64, "Qk" + "a" * 62, ""],
    ids=["file", "folders", "address", "absolute path", "letters", "nothing"],
)
def test_text_that_holds_no_image(text: str) -> None:
    assert embedded_image(text) is None


def test_pipelines_of_other_models_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ImageTextToTextPipeline.preprocess
    read_images_of_pipelines()
    assert ImageTextToTextPipeline.preprocess is before
    given = {"images": "not read", "text": "w1"}
    passed: list[Any] = []
    host = type("Host", (), {"processor": None})()
    module = sys.modules[ImageTextToTextPipeline.__module__]
    monkeypatch.setattr(module, "load_images", lambda images, timeout: passed.append(images))
    with pytest.raises(TypeError):  # the processor, which is not there, is called with the images
        before(host, given)
    assert passed == ["not read"]
