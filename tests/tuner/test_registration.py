"""Test CROME as a member of PEFT's enum and tables."""

from __future__ import annotations

import copy
import importlib
import json
import pickle

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_crome import CromeConfig, CromeModel, registration
from tests.tuner.helpers import assert_equal, frozen_logits, logits, trainable
from tests.zoo.llava import llava

CROME = PeftType("CROME")


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(lambda: PeftType.CROME, id="attribute"),
        pytest.param(lambda: PeftType["CROME"], id="by name"),
        pytest.param(lambda: PeftType("CROME"), id="by value"),
        pytest.param(lambda: list(PeftType)[-1], id="iteration"),
        pytest.param(lambda: next(m for m in reversed(PeftType) if m == "CROME"), id="reversed"),
        pytest.param(lambda: PeftType.__members__["CROME"], id="members"),
        pytest.param(lambda: copy.copy(CROME), id="copy"),
        pytest.param(lambda: copy.deepcopy(CROME), id="deepcopy"),
        pytest.param(lambda: CromeConfig().peft_type, id="config"),
        *(
            pytest.param(lambda p=p: pickle.loads(pickle.dumps(CROME, p)), id=f"pickle protocol {p}")
            for p in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_member_is_one_object(found) -> None:
    assert found() is CROME


def test_member_behaves_as_its_siblings() -> None:
    assert (CROME.name, CROME.value) == ("CROME", "CROME")
    assert type(CROME) is type(PeftType.LORA) is PeftType
    assert CROME in PeftType
    assert "CROME" in set(PeftType)
    assert CROME == "CROME" != PeftType.LORA
    assert hash(CROME) == hash("CROME")
    assert json.dumps(CROME) == '"CROME"'
    assert repr(CROME) == repr(PeftType.LORA).replace("LORA", "CROME")
    assert str(CROME) == str(PeftType.LORA).replace("LORA", "CROME")
    with pytest.raises(AttributeError):
        CROME.name = "other"
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("CROMEX")


def test_tables_have_the_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[CROME] is CromeConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[CROME] is CromeModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[CROME] == "crome_"
    assert CROME not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


@pytest.mark.parametrize("again", [registration.register, lambda: importlib.reload(registration).register()])
def test_registration_is_idempotent(again) -> None:
    members, tables = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    again()
    assert list(PeftType) == members
    assert [m.name for m in PeftType].count("CROME") == 1
    assert tables == PEFT_TYPE_TO_TUNER_MAPPING
    assert PeftType("CROME") is CROME


def test_members_are_distinct_and_found_by_value() -> None:
    assert len({id(m) for m in PeftType}) == len(PeftType) == len({m.value for m in PeftType})
    for member in PeftType:
        assert PeftType(member.value) is member is PeftType[member.name]
        assert pickle.loads(pickle.dumps(member)) is member


def some_config() -> CromeConfig:
    return CromeConfig(bottleneck_dim=8, branches={"text": ["embed_tokens"], "vision": r".*\.projector"}, dropout=0.1)


@pytest.mark.parametrize("loader", [PeftConfig, CromeConfig])
def test_config_round_trips_through_json(loader, tmp_path) -> None:
    config = some_config()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CROME"
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is CromeConfig
    assert loaded.to_dict() == config.to_dict() | {"inference_mode": loaded.inference_mode}


def test_config_from_a_dict_and_through_pickle() -> None:
    assert type(get_peft_config({"peft_type": "CROME", "bottleneck_dim": 8})) is CromeConfig
    config = some_config()
    assert pickle.loads(pickle.dumps(config)) == config


def test_other_methods_are_unaffected() -> None:
    host = llava()
    expected = frozen_logits(host)
    model = get_peft_model(host.model, LoraConfig(target_modules=["q_proj"]))
    assert_equal(logits(model, host.batch), expected)
    assert all("lora_" in path for path in trainable(model))
