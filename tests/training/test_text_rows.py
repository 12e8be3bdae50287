"""Test that rows without an image cost no forward pass when nothing would learn from them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_crome import CromeConfig
from peft_crome.data import load_rows
from peft_crome.data.media_rows import rows_with_media
from peft_crome.training import RecipeError, load_recipe, train
from peft_crome.training.loop.trainer import CromeTrainer
from peft_crome.training.stages import media_that_teach
from tests.zoo import ZOO


@pytest.fixture
def mixed(dataset: Path) -> dict[str, Path]:
    """Write files of the rows with an image, of rows of text, and of both together."""
    rows = json.loads(dataset.read_text())
    shown = [row for row in rows if "image" in row]
    text = [{"id": f"t{n}", "conversations": rows[-1]["conversations"]} for n in range(9)]
    together = [row for pair in zip(text, shown, strict=False) for row in pair] + shown[len(text) :]
    files = {"shown": shown, "text": text, "together": together}
    for name, content in files.items():
        (dataset.parent / f"{name}.json").write_text(json.dumps(content))
    return {name: dataset.parent / f"{name}.json" for name in files}


def trained(values: dict[str, Any], output: Path, *data: Path, **keys: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's weights after a run on these files."""
    files = [{"path": str(path), **keys} for path in data]
    train(load_recipe({**values, "output": str(output), "data": files}))
    return load_file(output / "adapter_model.safetensors")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_is_that_of_the_rows_with_images(
    values: dict[str, Any],
    mixed: dict[str, Path],
    tmp_path: Path,
    streaming: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, texts = CromeTrainer.training_step, []

    def seen(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        texts.append(len(inputs["input_ids"]) - len(inputs["pixel_values"]))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CromeTrainer, "training_step", seen)
    expected = trained(values, tmp_path / "shown", mixed["shown"], streaming=streaming)
    with caplog.at_level(logging.WARNING):
        found = trained(values, tmp_path / "together", mixed["together"], streaming=streaming)
    assert set(texts) == {0}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert ("are left out as they are read" if streaming else "9 of 20 rows") in caplog.text


def test_a_data_set_of_text_leaves_the_mixture(values: dict[str, Any], mixed: dict[str, Path], tmp_path: Path) -> None:
    values["mixture"] = {"temperature": 2.0}
    expected = trained(values, tmp_path / "two", mixed["shown"], mixed["together"])
    found = trained(values, tmp_path / "three", mixed["shown"], mixed["text"], mixed["together"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_text_alone_is_refused(values: dict[str, Any], mixed: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no row has any image or video"):
        trained(values, tmp_path / "text", mixed["text"])
    with pytest.raises(RecipeError, match=r"none of the first 1000 rows of .*text.json has any image or video"):
        trained(values, tmp_path / "text", mixed["shown"], mixed["text"], streaming=True, weight=1.0)
    assert not (tmp_path / "text").exists()


def test_a_text_branch_media_that_teach(values: dict[str, Any], mixed: dict[str, Path], tmp_path: Path) -> None:
    del values["backbones"]["qformer"], values["backbones"]["qformer_tokenizer"]
    del values["backbones"]["num_query_tokens"]
    values["adapter"] = {"branches": ["text", "vision"], "bottleneck_dim": 4}
    found = trained(values, tmp_path / "text", mixed["text"])
    assert next(value for key, value in found.items() if "crome_up" in key).any()


def test_the_numbers_are_those_of_a_selection(mixed: dict[str, Path]) -> None:
    rows = load_rows(mixed["together"])
    kept = rows_with_media(rows.select(range(5, 15)), {"image"})
    assert kept["id"] == [row["id"] for row in rows.select(range(5, 15)) if row["images"]]
    assert len(rows_with_media(rows.filter(lambda row: not row["images"]), {"image"})) == 0


@pytest.mark.parametrize(
    ("also", "learns"), [(None, False), (["multi_modal_projector"], False), (["lm_head"], True), (["norm"], True)]
)
def test_what_trains_beside_an_adapter_of_a_host(also: list[str] | None, learns: bool) -> None:
    model = get_peft_model(ZOO["llava"]().model, CromeConfig(modules_to_save=also))
    assert (media_that_teach(model) is None) == learns


def test_which_text_branches_read_words() -> None:
    assert media_that_teach(get_peft_model(ZOO["llava"]().model, CromeConfig(branches=["text"]))) is None
    of_images = {"image", "video"}
    assert media_that_teach(get_peft_model(ZOO["blip-2"]().model, CromeConfig())) == of_images  # behind a Q-Former
    hears = ZOO["gemma3n"]().model
    assert media_that_teach(get_peft_model(hears, CromeConfig(branches=["vision"]))) == of_images
    assert media_that_teach(get_peft_model(ZOO["gemma3n"]().model, CromeConfig())) == {*of_images, "audio"}
