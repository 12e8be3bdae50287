"""Test the guard. An adapter that does nothing is an error, and an ordinary batch is not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import peft_crome
from peft_crome.tuner.guard import PATIENCE, Guard, expected_branches
from tests.tuner.helpers import attach, crome_weight, randomize, snapshot
from tests.zoo import ZOO
from tests.zoo.case import WIDTH, words
from tests.zoo.llava import llava

TEXT, VISION = "base_model.model.model.language_model.embed_tokens", "base_model.model.model.multi_modal_projector"


def hooks(model: nn.Module) -> int:
    """Return the number of the guard's hooks. transformers leaves some hooks of its own."""
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__ == "peft_crome.tuner.guard" for hook in found)


def test_check_reports_each_site_and_changes_nothing() -> None:
    case = llava()
    model = attach(case.model).train()
    before, generator = snapshot(model), torch.get_rng_state()

    text, vision = sorted(peft_crome.check(model, case.batch), key=lambda row: row.branch)

    assert (text.branch, text.site, text.calls, text.embeddings, text.gradient) == ("text", TEXT, 1, 2 * 7, True)
    assert (vision.branch, vision.site, vision.calls, vision.embeddings) == ("vision", VISION, 1, 2 * 4)
    assert vision.gradient
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_check_needs_an_adapter() -> None:
    case = llava()
    with pytest.raises(ValueError, match=r"no active CROME adapter.*get_peft_model"):
        peft_crome.check(case.model, case.batch)
    model = attach(case.model)
    with model.disable_adapter(), pytest.raises(ValueError, match="no active CROME adapter"):
        peft_crome.check(model, case.batch)


def unused_site() -> tuple[nn.Module, dict[str, Any]]:
    """Build a model with a vision branch on a module of the right width that the model never calls."""
    case = llava()
    case.model.model.spare = nn.Linear(16, WIDTH)
    return attach(case.model, branches={"text": ["embed_tokens"], "vision": ["spare"]}), case.batch


def detached_site() -> tuple[nn.Module, dict[str, Any]]:
    """Build a model that computes its image features without gradients."""
    case = llava()
    get_image_features = case.model.model.get_image_features

    def without_gradient(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return get_image_features(*args, **kwargs)

    case.model.model.get_image_features = without_gradient
    return attach(case.model), case.batch


@pytest.mark.parametrize(
    "run",
    [peft_crome.check, lambda model, batch: model.train()(**batch)],
    ids=["check", "training"],
)
@pytest.mark.parametrize(
    ("build", "words_of_error"),
    [
        (unused_site, ["'vision' is not reached", "model.spare", "branches={'vision': ['<module path>']}"]),
        (detached_site, ["'vision' cannot learn", "multi_modal_projector", "branches={'vision': ['<module path>']}"]),
    ],
)
def test_silent_no_op_is_an_error(build: Any, words_of_error: list[str], run: Any) -> None:
    model, batch = build()
    with pytest.raises(RuntimeError) as error:
        run(model, batch)
    assert all(part in str(error.value) for part in words_of_error), error.value
    model.eval()(**batch)  # nothing is refused where nothing trains


def guard_of(model: nn.Module) -> Guard:
    found = (h.__self__ for m in model.modules() for h in m._forward_hooks.values() if hasattr(h, "__self__"))
    return next(hook for hook in found if isinstance(hook, Guard))


def test_guard_proves_each_branch_once() -> None:
    case = llava()
    model = attach(case.model)
    model.eval()(**case.batch)
    model.train()
    with model.disable_adapter():
        model(**case.batch)
    assert guard_of(model).unproven == {"text", "vision"}
    model(**words())
    assert guard_of(model).unproven == {"vision"}  # no image yet
    model(**case.batch)
    assert not guard_of(model).unproven


def test_guard_watches_a_second_adapter() -> None:
    case = llava()
    model = attach(case.model).train()
    model(**case.batch)
    model.add_adapter("other", model.peft_config["default"])
    assert hooks(model) == 2
    assert guard_of(model).unproven == {"text", "vision"}
    model.set_adapter("other")
    model(**case.batch)
    assert not guard_of(model).unproven


def test_a_branch_that_is_not_to_train_is_not_missed() -> None:
    """A branch that is frozen on purpose is not reported. Only the vision branch trains, without W_u."""
    case = llava()
    model = attach(case.model)
    randomize(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_vision.default.weight"))
    model.train()(**case.batch).loss.backward()
    assert crome_weight(model, "gate_vision").grad.any()
    assert crome_weight(model, "gate_text").grad is None
    assert guard_of(model).unproven == {"text"}


def test_training_while_merged_says_so() -> None:
    case = llava()
    model = attach(case.model)
    randomize(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"\['text'\] do not train: they are merged .*unmerge_adapter"):
        model.train()(**case.batch)
    model.unmerge_adapter()
    model.train()(**case.batch)


@pytest.mark.parametrize("trained", ["_vision.default.weight", "crome_up.default.weight"])
def test_training_beside_a_frozen_branch_that_is_merged(trained: str) -> None:
    """The vision branch trains beside a merged text branch as long as W_u is frozen. Training W_u would make the
    folded table wrong, so it is refused."""
    case = llava()
    model = attach(case.model)
    randomize(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    expected = gradient_of(model, case.batch, "gate_vision") if "vision" in trained else None
    model.merge_adapter()
    if expected is None:
        with pytest.raises(RuntimeError, match=r"\['text'\] do not train: they are merged"):
            model.train()(**case.batch)
    else:
        torch.testing.assert_close(gradient_of(model, case.batch, "gate_vision"), expected)


def gradient_of(model: nn.Module, batch: dict[str, Any], key: str) -> torch.Tensor:
    model.zero_grad()
    model.train()(**batch).loss.backward()
    return crome_weight(model, key).grad.clone()


def test_a_reentrant_checkpoint_that_closes_over_images_is_trusted() -> None:
    """A reentrant checkpoint that closes over images passes the guard. Mllama's cross-attention takes images by name,
    so autograd does not lead from the loss to the projector."""
    case = ZOO["mllama"]()
    model = attach(case.model, branches=["vision"])
    randomize(model)
    expected = gradient_of(model, case.batch, "gate_vision")
    assert expected.any()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    guard_of(model).unproven = {"vision"}
    torch.testing.assert_close(gradient_of(model, case.batch, "gate_vision"), expected)
    assert not guard_of(model).unproven


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the tower, which is frozen
def test_a_detached_site_is_an_error_under_a_reentrant_checkpoint() -> None:
    model, batch = detached_site()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="'vision' cannot learn"):
        model.train()(**batch)


@pytest.mark.parametrize("name", ["kosmos-2", "kosmos-2.5"])
def test_a_mask_of_image_places_is_no_image(name: str) -> None:
    case = ZOO[name]()
    model = attach(case.model, branches=["vision"]).train()
    model(**case.text_only)
    assert guard_of(model).unproven == {"vision"}
    model(**case.batch)
    assert not guard_of(model).unproven


@pytest.mark.parametrize(
    ("branch", "given", "expected"),
    [
        ("vision", {"batch_num_images": torch.tensor([0])}, False),
        ("vision", {"image_sizes": torch.tensor([[0, 0]])}, False),
        ("vision", {"image_grid_thw": [torch.tensor([1, 2, 2])]}, False),
        ("vision", {"image_embeds": torch.zeros(1, 0, 8)}, False),
        ("vision", {"image_mask": torch.ones(1, 4, dtype=torch.bool)}, False),
        ("vision", {"image_attention_mask": torch.zeros(1, 4)}, False),
        ("vision", {"pixel_values": torch.zeros(1, 3, 2, 2)}, True),
        ("vision", {"pixel_values": torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)}, True),
        ("vision", {"images": [[], [torch.zeros(3, 2, 2)]]}, True),
        ("audio", {"audio_token_lengths": torch.tensor([3])}, False),
        ("audio", {"input_features": torch.zeros(1, 4, 2)}, True),
        ("audio", {"audio_input_ids": torch.tensor([[3, 4]])}, True),
        ("audio", {"audio_input_ids": torch.zeros(1, 0, dtype=torch.long)}, False),
        ("text", {"input_ids": torch.tensor([[1]])}, True),
        ("text", {"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 2)}, False),
    ],
)
def test_what_counts_as_a_branch_s_input(branch: str, given: dict[str, Any], expected: bool) -> None:
    assert expected_branches([branch], given) == ({branch} if expected else set())


def test_passes_without_images_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes without images walk neither the model's modules nor autograd's graph, however many there are."""
    case = llava()
    model = attach(case.model, branches=["vision"]).train()
    monkeypatch.setattr("peft_crome.tuner.guard._reachable", lambda *_: pytest.fail("walked the graph"))
    monkeypatch.setattr("peft_crome.tuner.layer.crome_layers", lambda *_: pytest.fail("walked the modules"))
    for _ in range(3):
        model(**words())


def test_a_run_that_never_meets_an_image_is_warned_of() -> None:
    case = llava()
    model = attach(case.model, branches=None).train()
    for _ in range(PATIENCE - 1):
        model(**words())
    with pytest.warns(UserWarning, match=r"\['vision'\], so nothing was trained.*remove_unused_columns=False"):
        model(**words())
    model(**words())  # once


def test_unload_takes_the_guard_away() -> None:
    case = llava()
    assert hooks(attach(case.model).unload()) == 0


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_guarded_model_can_be_copied_and_pickled(again: Any) -> None:
    case = llava()
    model = attach(case.model)
    other = again(model)
    assert hooks(other) == 2
    other.train()(**case.batch)
    assert not guard_of(other).unproven
    assert guard_of(model).unproven == {"text", "vision"}


def test_embeddings_given_by_the_user_need_no_text_branch() -> None:
    case = llava()
    model = attach(case.model).train()
    embeddings = torch.randn(1, 5, WIDTH)
    model(inputs_embeds=embeddings, attention_mask=torch.ones(1, 5, dtype=torch.long))
    (text,) = (row for row in peft_crome.check(model, {"inputs_embeds": embeddings}) if row.branch == "text")
    assert text.calls == 0


def test_user_embeddings_bypass_the_text_branch() -> None:
    """The text branch adds nothing if the model gets `inputs_embeds`, because no tokens are turned into embeddings."""
    case = llava()
    model = attach(case.model).eval()
    embeddings = torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings).logits
        randomize(model)
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "instructblip_t5"])
def test_check_on_other_hosts(name: str) -> None:
    case = ZOO[name]()
    rows = peft_crome.check(attach(case.model), case.batch)
    assert {row.branch for row in rows if row.gradient} == {"text", "vision"}
