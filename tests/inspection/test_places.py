"""Test that tokens are drawn in their places. A tower whose tokens depend on one place only shows which cell it is."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from peft_crome.inspection import inspect_activity, map_images
from peft_crome.inspection.places import GRID_THW, SQUARE, printable, words
from tests.tuner.helpers import adapted, attach, randomize
from tests.vlm.tiny import build, make_batch
from tests.zoo import ZOO
from tests.zoo.case import VISION, pixels, token_rows

SIDE = 16  # pixels: 4 x 4 patches
TOKENS = {
    "llava": 16,
    "vipllava": 16,
    "paligemma": 16,
    "gemma3": 4,
    "internvl": 4,
    "aya_vision": 4,
    "cohere2_vision": 4,
}


def look_nowhere_else(model: nn.Module) -> None:
    """Skip the layers of the tower, so that each token depends only on its own patches."""

    def skip(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    for path, layers in model.named_modules():
        inside = ("vision" in path or "visual" in path) and "language_model" not in path and "merger" not in path
        if isinstance(layers, nn.ModuleList) and inside and "deepstack" not in path:
            for layer in layers:
                layer.register_forward_hook(skip, with_kwargs=True)


def cells_that_change(model: Any, batch: dict[str, Any], other: dict[str, Any], images: int = 2) -> list[np.ndarray]:
    """Return, for each image, the cells in which the map of the change differs between two batches."""
    drawn = []
    for given in (batch, other):
        activity = next(row for row in inspect_activity(model, given) if row.branch == "vision")
        views = [Image.new("RGB", (8, 8))] * images
        maps = map_images(getattr(model, "get_base_model", lambda: model)(), given, activity, views)
        assert len(maps) == images
        drawn.append([found.values(activity.change_norm) for found in maps])
    return [~np.isclose(a, b, rtol=1e-4) for a, b in zip(*drawn, strict=True)]


def assert_one(changed: np.ndarray, row: int, column: int) -> None:
    expected = np.zeros_like(changed)
    expected[row, column] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("name", SQUARE)
def test_square_grids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VISION, "image_size", SIDE)
    for module in ("llava", "gemma"):
        monkeypatch.setattr(importlib.import_module(f"tests.zoo.{module}"), "IMAGE_SIZE", SIDE)
    case = ZOO[name]()
    model = adapted(case)
    look_nowhere_else(model)
    batch = token_rows(1, TOKENS[name]) | {"pixel_values": pixels(2, 3, SIDE, SIDE)}
    batch |= {key: torch.zeros_like(batch["input_ids"]) for key in ("token_type_ids",) if key in case.batch}
    cells = int(TOKENS[name] ** 0.5)
    size = SIDE // cells
    row, column = 1, 0
    other = dict(batch, pixel_values=batch["pixel_values"].clone())
    other["pixel_values"][1, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 3
    first, second = cells_that_change(model, batch, other)
    assert not first.any()
    assert_one(second, row, column)


@pytest.mark.parametrize("name", GRID_THW)
def test_merged_grids_also_where_windows_reorder_them(name: str) -> None:
    case = ZOO[name]()
    model = adapted(case)
    look_nowhere_else(model)
    width = case.batch["pixel_values"].shape[-1]
    rows, columns = 8, 12  # patches; 4 x 6 tokens, so that a window of 2 x 2 tokens is not whole rows
    batch = token_rows(1, 24, around=(57, 58)) | {
        "pixel_values": pixels(2 * rows * columns, width),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * 2),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == 60).int()
    row, column = 2, 3
    patch = rows * columns + 4 * (row * columns // 2 + column)  # of the second image, four patches in a square
    other = dict(batch, pixel_values=batch["pixel_values"].clone())
    other["pixel_values"][patch : patch + 4] += 3
    first, second = cells_that_change(model, batch, other)
    assert not first.any()
    assert second.shape == (4, 6)
    assert_one(second, row, column)


@pytest.mark.parametrize("settings", [{}, {"vision_pool_size": 3}, {"vision_feature_select_strategy": "full"}])
def test_composite(settings: dict[str, Any]) -> None:
    model = attach(build(**settings))
    randomize(model)
    look_nowhere_else(model)
    batch = make_batch(model.get_base_model())
    other = dict(batch, pixel_values=batch["pixel_values"].clone())
    other["pixel_values"][2, :, 10:20, 20:30] += 3
    *others, last = cells_that_change(model, batch, other, images=3)
    assert not any(changed.any() for changed in others)
    assert last.shape == ((1, 1) if "vision_pool_size" in settings else (3, 3))
    assert_one(last, *((0, 0) if "vision_pool_size" in settings else (1, 2)))


def test_grid_that_is_not_known_is_none() -> None:
    case = ZOO["idefics2"]()
    model = adapted(case)
    for activity in inspect_activity(model, case.batch):
        assert map_images(model.get_base_model(), case.batch, activity, [Image.new("RGB", (8, 8))] * 2) == []


class Words:
    """A stand-in for a tokenizer, of which only `decode` is used."""

    def decode(self, ids: list[int]) -> str:
        return {5: " <b>", 6: "a\n"}.get(ids[0], f"w{ids[0]}")


def test_words_have_gaps_where_images_stand() -> None:
    case = ZOO["llava"]()
    rows = {row.branch: row for row in inspect_activity(adapted(case), {k: v[:1] for k, v in case.batch.items()})}
    assert words(rows["text"], Words()) == [("w1", 0), ("[4 image tokens]", None), ("·<b>", 1), ("a↵", 2)]
    assert words(rows["vision"], Words()) == [("1", 0), ("2", 1), ("3", 2), ("4", 3)]


def test_what_cannot_be_seen_is_written_out() -> None:
    assert printable(" a\t\n") == "·a⇥↵"
    assert printable("\x1b\u202e\u200b") == "\\x1b\\u202e\\u200b"
    assert printable("日é") == "日é"
