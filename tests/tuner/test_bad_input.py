"""Test that bad input gives one error with the given value, the expected one and what to write. Nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from peft_crome import CromeConfig, CromeLayer
from tests.tuner.helpers import BOTH, adapted, assert_message, attach, unchanged
from tests.zoo.case import TEXT
from tests.zoo.llava import llava


@pytest.mark.parametrize(
    ("field", "value", "expected", "remedy"),
    [
        ("bottleneck_dim", 0, "not between 1", "Write bottleneck_dim=256"),
        ("bottleneck_dim", -1, "not between 1", "Write bottleneck_dim=256"),
        ("bottleneck_dim", 2.5, "is not an int", "Write bottleneck_dim=256"),
        ("bottleneck_dim", 256.0, "is not an int", "Write bottleneck_dim=256"),
        ("bottleneck_dim", True, "is not an int", "Write bottleneck_dim=256"),
        ("bottleneck_dim", "256", "is not an int", "Write bottleneck_dim=256"),
        ("gate_activation", "sigmoyd", "expected one of ('silu', 'sigmoid')", "Write gate_activation='silu'"),
        ("gate_activation", "gelu", "expected one of ('silu', 'sigmoid')", "Write gate_activation='silu'"),
        ("gate_activation", None, "expected one of ('silu', 'sigmoid')", "Write gate_activation='silu'"),
        ("dropout", 1.0, "[0, 1)", "Write dropout=0.0"),
        ("dropout", -0.1, "[0, 1)", "Write dropout=0.0"),
        ("dropout", float("nan"), "[0, 1)", "Write dropout=0.0"),
        ("dropout", "0.1", "[0, 1)", "Write dropout=0.0"),
        ("dropout", True, "[0, 1)", "Write dropout=0.0"),
        ("init_weights", "orthogonal", "expected True, False or one of", "Write init_weights=True"),
        ("modules_to_save", "lm_head", "is a string", "Write modules_to_save=['lm_head']"),
        ("target_modules", ["q_proj"], "named by branch", "Write branches={'vision': ['q_proj']}"),
        ("target_modules", "q_proj", "named by branch", "Write branches={'vision': "),
        ("branches", {}, "neither a list of names nor a dict", "Write branches="),
        ("branches", [], "neither a list of names nor a dict", "Write branches="),
        ("branches", "vision", "neither a list of names nor a dict", "Write branches="),
        ("branches", ["vision", "vision"], "twice", "Write each once"),
        ("branches", ["model.projector"], "not an identifier", "Write branches="),
        ("branches", {"a.b": ["embed_tokens"]}, "not an identifier", "Write branches="),
        ("branches", {1: ["embed_tokens"]}, "not an identifier", "Write branches="),
        ("branches", {"text": []}, "neither a list of names nor a regex", "Write branches="),
        ("branches", {"text": 3}, "neither a list of names nor a regex", "Write branches="),
        ("branches", {"text": ""}, "neither a list of names nor a regex", "Write branches="),
    ],
)
def test_config_refuses_a_wrong_value(field: str, value: Any, expected: str, remedy: str) -> None:
    given = next(iter(value)) if field == "branches" and isinstance(value, (dict, list)) and value else value
    with pytest.raises((ValueError, TypeError)) as error:
        CromeConfig(**{field: value})
    assert_message(error.value, field, repr(given), expected, remedy)


EMBEDDINGS, PROJECTOR = "model.language_model.embed_tokens", "model.multi_modal_projector"
TEXT_SITE = {"text": ["embed_tokens"]}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        pytest.param(
            {"branches": TEXT_SITE | {"vision": ["multi_modal_projectr"]}},
            ["branches['vision']", "'multi_modal_projectr'", "Did you mean", PROJECTOR, "Write branches="],
            id="name matches nothing",
        ),
        pytest.param(
            {"branches": TEXT_SITE | {"vision": ["multi_modal_projector", "no.such.part"]}},
            ["branches['vision']", "'no.such.part'", "Write branches="],
            id="second name matches nothing",
        ),
        pytest.param(
            {"branches": TEXT_SITE | {"vision": r"projector\d"}},
            ["branches['vision']", r"projector\\d", "Did you mean", "Write branches="],
            id="pattern matches nothing",
        ),
        pytest.param(
            {"branches": TEXT_SITE | {"vision": r"multi_modal_(projector"}},
            ["branches['vision']", "multi_modal_(projector", "Write branches="],
            id="pattern is no regex",
        ),
        pytest.param(
            {"branches": TEXT_SITE | {"vision": ["encoder.layers.0.mlp.fc2"]}},
            ["branches['vision']", "encoder.layers.0.mlp.fc2", "[16]", "32", "branches={'vision': "],
            id="other width",
        ),
        pytest.param(
            {"branches": {"text": ["lm_head"], "vision": [PROJECTOR]}},
            ["branches['text']", "'lm_head'", "[64]", "32", "branches={'text': "],
            id="width of the vocabulary",
        ),
        pytest.param(
            {"branches": TEXT_SITE | {"vision": [PROJECTOR, PROJECTOR + ".linear_2"]}},
            [PROJECTOR + ".linear_2", "branches={'vision': ["],
            id="nested sites",
        ),
        pytest.param(
            {"branches": {"vision": [PROJECTOR], "image": [PROJECTOR]}},
            [PROJECTOR, "(vision)", "(image)", "Keep one: branches="],
            id="one site in two branches",
        ),
        pytest.param(
            {"modules_to_save": ["language_model"]},
            ["modules_to_save=['language_model']", EMBEDDINGS, f"Write modules_to_save=['{EMBEDDINGS}']"],
            id="modules_to_save contains a site",
        ),
        pytest.param(
            {"modules_to_save": ["lm_head", "model"]},
            ["'model' contains the site", "Write modules_to_save="],
            id="modules_to_save contains every site",
        ),
        pytest.param(
            {"modules_to_save": ["lm_haed"]},
            ["modules_to_save=['lm_haed']", "matches no module", "Write modules_to_save=['lm_head']"],
            id="modules_to_save matches nothing",
        ),
    ],
)
@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_attachment_refuses_a_wrong_config(config: dict[str, Any], parts: list[str], second: bool) -> None:
    model: nn.Module = attach(llava().model) if second else llava().model
    add = model.add_adapter if second else lambda name, config: get_peft_model(model, config, name)
    with unchanged(model), pytest.raises((ValueError, TypeError)) as error:
        add("second", CromeConfig(**{"branches": BOTH, "bottleneck_dim": 4, **config}))
    assert_message(error.value, *parts)


def test_a_branch_that_is_not_known_by_name() -> None:
    model = llava().model
    with unchanged(model), pytest.raises(ValueError, match=r"\['audio'\] are not known") as error:
        get_peft_model(model, CromeConfig(branches=["vision", "audio"]))
    assert_message(error.value, PROJECTOR, "branches=['text', 'vision']", "branches={'audio': ['<module path>']}")


def test_attachment_refuses_a_model_without_vision() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    with unchanged(model), pytest.raises(ValueError, match="No vision site is known for LlamaForCausalLM") as error:
        attach(model)
    assert_message(error.value, "'llama'", "branches={'vision': ['", "from_backbones")


def test_attachment_lists_modules_of_the_language_model_s_width() -> None:
    model = llava().model
    model.config.model_type = "unheard_of"
    model.model.prism = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    with unchanged(model), pytest.raises(ValueError, match="No vision site") as error:
        attach(model)
    assert_message(error.value, "'unheard_of'", "(32)", "{'vision': ['model.prism']}")
    assert "layers.0" not in str(error.value)


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_attachment_that_fails_half_way_changes_nothing(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = attach(llava().model) if second else llava().model
    add = model.add_adapter if second else lambda name, config: get_peft_model(model, config, name)

    def fail_at_the_projector(layer: CromeLayer, *args: Any) -> None:
        if not isinstance(layer.base_layer, nn.Embedding):
            raise MemoryError("no room for the projector's adapter")

    monkeypatch.setattr(CromeLayer, "_move_adapter_to_device_of_base_layer", fail_at_the_projector)
    with unchanged(model), pytest.raises(MemoryError, match="no room"):
        add("second", CromeConfig(branches=BOTH, bottleneck_dim=4))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merge_refuses_before_it_changes_anything(method: str) -> None:
    model = attach(llava().model, branches={"vision": ["multi_modal_projector"]})
    with unchanged(model), pytest.raises(ValueError, match="Nothing can be merged") as error:
        getattr(model, method)()
    assert_message(error.value, PROJECTOR, "not an embedding table", "unload()")


def test_merge_refuses_broken_weights_before_it_changes_anything() -> None:
    model = adapted(llava())
    with torch.no_grad():
        model.get_parameter("base_model.model.crome.crome_up.default.weight")[0, 0] = float("inf")
    with unchanged(model), pytest.raises(ValueError, match=r"NaNs detected .* adapter default"):
        model.merge_adapter(safe_merge=True)
