"""Test the directory that a stage starts from: it must be complete, fit the recipe's architecture and have its
backbones."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from peft_crome import CromeVLMForConditionalGeneration
from peft_crome.training import StageError, load_recipe, train
from tests.training.tiny import following, weights
from tests.vlm.tiny import make_tokenizer


def test_directory_of_another_architecture_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    train(load_recipe(values))
    later = following(values, "instruct", tmp_path / "instruct", backbones=copy.deepcopy(values["backbones"]))
    later["backbones"]["num_query_tokens"] = 8
    later["backbones"]["language"] = "another/model"
    later["adapter"] = {"bottleneck_dim": 16}
    with pytest.raises(StageError) as error:
        train(load_recipe(later))
    for text in ("'another/model' in the recipe", "num_query_tokens: 8 in the recipe, 4 there", "bottleneck_dim: 16"):
        assert text in str(error.value)
    assert "dtype" not in str(error.value)
    assert not (tmp_path / "instruct").exists()
    later["backbones"] = {"quantization": "4bit", **values["backbones"]}
    del later["adapter"]
    with pytest.raises(StageError, match=r"differs|backbones.quantization: '4bit' in the recipe, None there"):
        train(load_recipe(later))
    del later["backbones"]
    later["adapter"] = {"dropout": 0.5}
    train(load_recipe(later))
    adapter = json.loads((tmp_path / "instruct" / "adapter_config.json").read_text())
    assert adapter["dropout"] == 0.5


def test_another_qformer_is_another_architecture(
    values: dict[str, Any], backbones: tuple[str, str], tmp_path: Path
) -> None:
    """A recipe with `backbones` must have the directory's Q-Former and tokenizer. Other keys that it leaves out are
    taken from the directory."""
    train(load_recipe(values))
    before = copy.deepcopy(values["backbones"])
    plain = {key: value for key, value in before.items() if key in ("vision", "language")}
    with pytest.raises(StageError, match=r"backbones.qformer: none in the recipe, one there"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=plain)))
    make_tokenizer(extra_special_tokens=["<another>"]).save_pretrained(tmp_path / "tokenizer")
    other = {**before, "qformer_tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(StageError, match=r"another tokenizer for its Q-Former, and the recipe says backbones.qformer"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=other)))
    small = {key: value for key, value in before["qformer"].items() if key != "num_hidden_layers"}
    other = {**before, "qformer": small}
    with pytest.raises(StageError, match=r"backbones.qformer.num_hidden_layers: 12 in the recipe, 2 there"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=other)))
    assert not (tmp_path / "instruct").exists()


def test_backbones_that_have_moved_are_named_anew(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Backbones that have moved are renamed by the next stage's recipe, or by hand in config.json."""
    for key in ("vision", "language"):
        shutil.copytree(values["backbones"][key], tmp_path / key)
        values["backbones"][key] = str(tmp_path / key)
    train(load_recipe(values))
    now = copy.deepcopy(values["backbones"])
    for key in ("vision", "language"):
        now[key] = str((tmp_path / key).rename(tmp_path / f"{key}-now"))
    with pytest.raises(StageError, match=r"which are not there. If they have moved, write the `backbones`"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct")))
    tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    other = {**now, "language": str(tmp_path / "gpt2")}
    with pytest.raises(StageError, match=r"is not the model that was trained with: .*'gpt2', not 'llama'"):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=other)))
    train(load_recipe(following(values, "instruct", tmp_path / "instruct", backbones=now)))
    assert "is not there; text_model_name_or_path is taken from" in caplog.text
    config = json.loads((tmp_path / "instruct" / "config.json").read_text())
    assert config["vision_model_name_or_path"] == now["vision"]
    CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "instruct")

    file = Path(values["output"]) / "config.json"
    text = file.read_text()
    for key in ("vision", "language"):
        text = text.replace(f'"{values["backbones"][key]}"', f'"{now[key]}"')
    for broken in (text.replace('"vision_feature_layer": -1', '"vision_feature_layer": -2'), text[:-20]):
        file.write_text(broken)
        with pytest.raises(StageError, match=r"is incomplete: config.json \(of other content"):
            train(load_recipe(following(values, "instruct", tmp_path / "by-hand")))
    file.write_text(text)
    train(load_recipe(following(values, "instruct", tmp_path / "by-hand")))


@pytest.mark.parametrize("damage", ["no record", "missing", "truncated", "no directory"])
def test_half_written_directory_is_refused(damage: str, values: dict[str, Any], tmp_path: Path) -> None:
    directory = Path(values["output"])
    if damage != "no directory":
        train(load_recipe(values))
    if damage == "no record":
        (directory / "crome_stage.json").unlink()
    elif damage == "missing":
        (directory / "adapter_model.safetensors").unlink()
    elif damage == "truncated":
        data = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(
        StageError, match=r"not the directory of a complete|is incomplete: (adapter_)?model.safetensors"
    ):
        train(load_recipe(following(values, "instruct", tmp_path / "instruct")))
    assert not (tmp_path / "instruct").exists()


@pytest.mark.parametrize("previous", ["runs/pretrain", "{}/nowhere"], ids=["a name", "a path"])
def test_previous_that_is_nowhere_is_said_so(previous: str, values: dict[str, Any], tmp_path: Path) -> None:
    later = {**following(values, "instruct", tmp_path / "instruct"), "previous": previous.format(tmp_path)}
    with pytest.raises(
        StageError, match=r"is neither a directory nor a Hub repository|is not the directory of a complete stage"
    ):
        train(load_recipe(later))
    assert not (tmp_path / "instruct").exists()


def test_wrong_order_and_existing_output_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    train(load_recipe(values))
    before = weights(Path(values["output"]))
    with pytest.raises(StageError, match="is not overwritten"):
        train(load_recipe(values))
    with pytest.raises(StageError, match=r"'pretrain' starts from the backbones alone"):
        train(load_recipe(following(values, "pretrain", tmp_path / "again")))
    after = weights(Path(values["output"]))
    assert all(torch.equal(after[key], value) for key, value in before.items())
