"""Test the record of the model that an adapter was trained on. One warning names all differences, and the same model
gives no warning."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import nn

import peft_crome
from peft_crome.backbone.model import read_host
from peft_crome.sharing.provenance import describe_backbone, differences
from tests.tuner.helpers import adapted, assert_message, attach
from tests.vlm.tiny import build
from tests.zoo.llava import llava

CONFIG = "adapter_config.json"
RECORD: dict[str, Any] = {
    "name_or_path": "a/b",
    "revision": None,
    "model_type": "llava",
    "hidden_size": 32,
    "embedding_rms": [1.0, 2.0],
    "tower": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "feature_layer": -2},
    "quantization": None,
    "versions": {"peft_crome": "0.1.0", "peft": "0.21.2", "transformers": "5.23.0"},
}
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted(llava()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_record(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["trained_on"] = {**config["trained_on"], **values}
    (folder / CONFIG).write_text(json.dumps(config))


def load(adapter: Path, model: nn.Module | None = None) -> list[str]:
    """Load an adapter and return the warnings about another model."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        PeftModel.from_pretrained(llava().model if model is None else model, adapter)
    return [str(w.message) for w in caught if "was trained on another model" in str(w.message)]


def test_record_has_all_that_is_compared(adapter: Path) -> None:
    record = json.loads((adapter / CONFIG).read_text())["trained_on"]
    assert set(record) == set(RECORD)
    assert record["tower"] == {
        "model_type": "clip_vision_model",
        "image_size": llava().model.config.vision_config.image_size,
        "patch_size": llava().model.config.vision_config.patch_size,
        "feature_layer": llava().model.config.vision_feature_layer,
    }
    assert record["quantization"] is None
    assert record["versions"]["peft_crome"] == peft_crome.__version__
    assert record["versions"]["transformers"] == tf.__version__


def test_the_same_model_gives_no_warning(adapter: Path, recwarn: pytest.WarningsRecorder) -> None:
    PeftModel.from_pretrained(llava().model, adapter)
    assert not [w for w in recwarn if "trained on" in str(w.message)]


def test_one_warning_names_all_that_differs(adapter: Path) -> None:
    change_record(
        adapter,
        embedding_rms=[9.0],
        revision="0123456789abcdef",
        tower={"image_size": 336},
        quantization=FOUR_BIT,
        versions={"peft": "9.0.0"},
    )
    messages = load(adapter)
    assert len(messages) == 1
    size = llava().model.config.vision_config.image_size
    assert_message(
        UserWarning(messages[0]),
        "- backbone: This adapter was trained on 'LlavaForConditionalGeneration' (llava, revision '0123456789ab')",
        f"- vision tower: it was trained with image size 336, here {size}",
        "- quantization: it was trained on weights quantized by 'bitsandbytes', load_in_4bit=True, "
        "bnb_4bit_quant_type='nf4', these are not quantized",
        "- versions: it was trained with peft 9.0.0; here are peft",
        "pip install peft==9.0.0",
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "qwen2_vl"}, "backbone: This adapter was trained on 'a/b' (qwen2_vl)"),
        ({"hidden_size": 64}, "backbone"),
        ({"embedding_rms": [1.0, 2.1]}, "whose embeddings differ"),
        ({"tower": {**RECORD["tower"], "image_size": 224}}, "trained with image size 224, here 336"),
        ({"tower": {**RECORD["tower"], "model_type": "vit"}}, "model type 'vit', here 'clip_vision_model'"),
        ({"tower": {**RECORD["tower"], "feature_layer": -1}}, "feature layer -1, here -2"),
        ({"quantization": FOUR_BIT}, "quantized by 'bitsandbytes', load_in_4bit=True"),
        ({"versions": {"transformers": "4.57.0"}}, "trained with transformers 4.57.0; here are transformers 5.23.0"),
        ({"versions": {"transformers": "5.24.0"}}, "pip install transformers==5.24.0"),
        ({"versions": {"peft": "0.20.0"}}, "peft==0.20.0"),
        ({"versions": {"peft_crome": "0.2.0"}}, "pip install peft-crome==0.2.0"),
    ],
)
def test_one_thing_that_differs_is_one_sentence(change: dict[str, Any], part: str) -> None:
    found = differences({**RECORD, **change}, RECORD)
    assert len(found) == 1
    assert part in found[0]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"name_or_path": "/elsewhere"},
        {"revision": "main"},
        {"embedding_rms": [1.005, 2.0]},
        {"versions": {"peft_crome": "0.1.3", "peft": "0.21.0", "transformers": "5.9.1"}},
        {"versions": {"peft": "unknown"}},
        {"tower": None},
        {"tower": {"more": 1}},
    ],
    ids=str,
)
def test_what_has_no_effect_is_not_mentioned(change: dict[str, Any]) -> None:
    assert differences({**RECORD, **change}, RECORD) == []


@pytest.mark.parametrize("missing", [*RECORD, "all"])
def test_records_of_older_releases_are_compared_as_far_as_they_go(missing: str, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    if missing == "all":
        del config["trained_on"]
    else:
        del config["trained_on"][missing]
    (adapter / CONFIG).write_text(json.dumps(config))
    assert load(adapter) == []


def test_another_resolution_of_the_composite_s_tower_is_named(tmp_path: Path) -> None:
    attach(build()).save_pretrained(tmp_path)
    messages = load(tmp_path, build(image_size=[20, 40]))
    assert len(messages) == 1
    assert "image size 30, here [20, 40]" in messages[0]


def test_quantization_of_a_model_is_recorded() -> None:
    model = llava().model
    model.config.quantization_config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    record = describe_backbone(model, replace(read_host(model), rows=None), 32)
    assert record["quantization"] == {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"
    }  # fmt: skip
    json.dumps(record)
