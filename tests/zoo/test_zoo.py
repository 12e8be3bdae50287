"""Test every architecture: the sites, an identity at first, the effect of each branch, gradients, saving, merging
and unloading."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from peft_crome import CromeConfig, CromeLayer
from peft_crome.backbone.model import text_hidden_size
from tests.test_public_api import PYPROJECT
from tests.tuner.helpers import (
    M,
    adapted,
    assert_equal,
    assert_message,
    attach,
    crome_weight,
    file_keys,
    frozen_logits,
    logits,
    randomize,
    to_dtype,
    trainable,
    unchanged,
    untying_changes,
)
from tests.zoo import REFUSED, WIDTH, ZOO, Batch, Case

QUICK = (
    "llava",
    "qwen2_5_vl",
    "gemma3",
    "paligemma",
    "internvl",
    "idefics3",
    "instructblip_t5",
    "chameleon",
)  # test-fast
each_architecture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ZOO]
)


def applies(case: Case, check: str) -> None:
    if check in case.not_applicable:
        pytest.skip(case.not_applicable[check])


def text_only(case: Case) -> Batch:
    if case.text_only is None:
        pytest.skip(case.not_applicable["text only"])
    return case.text_only


@each_architecture
def test_sites(name: str, record_property: Callable[[str, Any], None]) -> None:
    """CROME wraps exactly the expected modules, without being given their paths."""
    case = ZOO[name]()
    record_property("class", type(case.model).__name__)
    record_property("sites", case.sites)
    record_property("not_applicable", case.not_applicable)
    model = attach(case.model, branches=[*case.sites]).get_base_model()
    paths = {module: path for path, module in model.named_modules()}  # the first, of a module that has several
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        if isinstance(module, CromeLayer):
            for branch in module.branches:
                found.setdefault(branch, set()).add(path)
    expected = {
        branch: {paths[model.get_submodule(site.split("[")[0])] for site in sites}
        for branch, sites in case.sites.items()
    }
    assert found == expected


@each_architecture
def test_count(name: str) -> None:
    case = ZOO[name]()
    model = attach(case.model, branches=[*case.sites])
    pairs = [f"{kind}_{branch}" for branch in case.sites for kind in ("gate", "down")]
    assert model.get_nb_trainable_parameters()[0] == (2 * len(case.sites) + 1) * WIDTH * M
    assert sorted(trainable(model)) == sorted(
        f"base_model.model.crome.crome_{key}.default.weight" for key in ["up", *pairs]
    )


@each_architecture
def test_known_checkpoint(name: str, record_property: Callable[[str, Any], None]) -> None:
    """At the size of the family's best-known checkpoint, the default adapter has about 1280·d weights. The
    configuration's defaults usually describe that checkpoint."""
    case = ZOO[name]()
    model_class, config_class = type(case.model), type(case.model.config)
    config = case.known() if case.known else config_class()
    with torch.device("meta"):
        model = model_class(config)
    model = get_peft_model(model, CromeConfig())
    count = model.get_nb_trainable_parameters()[0]
    width = text_hidden_size(model.get_base_model())
    branches = [branch for branch in case.sites if branch != "text"]
    assert sorted(model.peft_config["default"].branches) == sorted(branches)
    assert count == {1: 3 * 424, 2: 5 * 256}[len(branches)] * width
    said = re.search(r"similar configuration to that of[^\[]*\[([^\]]+)\]", config_class.__doc__ or "")
    record_property("checkpoint", said.group(1) if said else "")
    record_property("width", width)
    record_property("parameters", count)


@each_architecture
def test_identity(name: str) -> None:
    """A fresh adapter leaves the logits equal to the frozen base's bit for bit, in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        case = ZOO[name]()
        if dtype == torch.bfloat16 and "bfloat16" in case.not_applicable:
            continue
        model = case.model.to(dtype).requires_grad_(False)
        batch = to_dtype(case.batch, dtype)
        expected = logits(model, batch)
        assert torch.isfinite(expected).all()
        assert_equal(logits(attach(model, branches=[*case.sites]), batch), expected)


@each_architecture
def test_vision(name: str) -> None:
    """Each branch other than text changes the logits of a prompt with an image (or sound). It changes no logits
    without one."""
    case = ZOO[name]()
    with_image = frozen_logits(case)
    without = None if case.text_only is None else logits(case.model, case.text_only)
    for branch in case.sites:
        if branch == "text":
            continue
        case = ZOO[name]()
        model = adapted(case)
        silence(model, [other for other in case.sites if other != branch])
        assert not torch.allclose(logits(model, case.batch), with_image, atol=1e-4), branch
        if without is not None:
            assert_equal(logits(model, case.text_only), without)


@each_architecture
def test_text(name: str) -> None:
    """The text branch alone changes the logits."""
    case = ZOO[name]()
    expected = frozen_logits(case)
    model = adapted(case)
    silence(model, [branch for branch in case.sites if branch != "text"])
    assert not torch.allclose(logits(model, case.batch), expected, atol=1e-4)


def silence(model: PeftModel, branches: list[str]) -> None:
    """Turn branches back into identities."""
    with torch.no_grad():
        for branch in branches:
            crome_weight(model, f"down_{branch}").zero_()


@each_architecture
def test_gradients(name: str) -> None:
    """Every adapter parameter gets a finite gradient that is not all zero. No parameter of the base gets one."""
    case = ZOO[name]()
    model = attach(case.model, branches=[*case.sites])
    randomize(model)
    output = model(**case.batch)
    loss = output.loss if output.loss is not None else output.logits.square().mean()  # DiffusionGemma computes none
    loss.backward()
    for path, parameter in model.named_parameters():
        if "crome_" in path:
            assert parameter.grad is not None, path
            assert torch.isfinite(parameter.grad).all(), path
            assert parameter.grad.any(), path
        else:
            assert parameter.grad is None, path


@each_architecture
def test_save(name: str, tmp_path: Path) -> None:
    """A saved adapter gives equal logits on a fresh base. Its file holds only `crome_` keys."""
    case = ZOO[name]()
    model = adapted(case)
    model.requires_grad_(False)  # as the loaded one will be: kernels are chosen by it
    expected = logits(model, case.batch)
    model.save_pretrained(tmp_path)
    pairs = [f"{kind}_{branch}" for branch in case.sites for kind in ("gate", "down")]
    assert file_keys(tmp_path) == sorted(f"base_model.model.crome.crome_{key}.weight" for key in ["up", *pairs])
    loaded = PeftModel.from_pretrained(ZOO[name]().model, tmp_path)
    assert_equal(logits(loaded, case.batch), expected)


@each_architecture
def test_generate(name: str) -> None:
    """Greedy generation gives equal results with and without a cache, and the adapter changes it."""
    case = ZOO[name]()
    applies(case, "generate")
    inputs = case.generate_inputs()
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    base = case.model.generate(**inputs, **settings).logits[0]
    model = adapted(case)
    caches = [True] if "no cache" in case.not_applicable else [True, False]
    runs = [model.generate(**inputs, **settings, use_cache=use_cache) for use_cache in caches]
    assert torch.equal(runs[0].sequences, runs[-1].sequences)
    for cached, full in zip(runs[0].logits, runs[-1].logits, strict=True):
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, runs[0].logits[0], atol=1e-4)


@each_architecture
def test_disable(name: str) -> None:
    """Inside `disable_adapter` the logits equal the base's bit for bit. Afterward the adapter acts again."""
    case = ZOO[name]()
    expected = frozen_logits(case)
    model = adapted(case)
    with model.disable_adapter():
        assert_equal(logits(model, case.batch), expected)
    assert not torch.equal(logits(model, case.batch), expected)


@each_architecture
def test_fold(name: str) -> None:
    """The text branch can be merged into the embedding table and unmerged again."""
    case = ZOO[name]()
    applies(case, "fold")
    if untying_changes(case.model, case.batch):
        check_merge_refused(case, "scales its output")
        return
    model = adapted(case)
    layer = case.model.get_submodule(case.sites["text"][0])
    table = layer.weight.detach().clone()
    vocabulary = torch.arange(len(table))
    with torch.no_grad():
        adapted_rows = layer(vocabulary)
    expected = logits(model, case.batch)

    model.merge_adapter()

    assert not torch.equal(layer.weight, table)
    if not case.scaled_table:
        assert_equal(layer.weight.detach(), adapted_rows)
    # Not bit-equal: a product of 64 rows may round unlike one of 7.
    torch.testing.assert_close(logits(model, case.batch), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert_equal(layer.weight.detach(), table)
    assert_equal(logits(model, case.batch), expected)


@each_architecture
@pytest.mark.filterwarnings("ignore:.*no longer tied")  # true, and test_peft_contract.py expects it
def test_merge_and_unload(name: str, tmp_path: Path) -> None:
    """An adapter on the embedding table alone merges into a plain model. Merging an adapter that also has other
    branches is refused."""
    case = ZOO[name]()
    applies(case, "fold")
    if untying_changes(case.model, case.batch):
        return  # test_fold
    if not any("[" in site for sites in case.sites.values() for site in sites):
        with pytest.raises(ValueError, match=r"can be merged.*Keep the adapter attached"):
            adapted(ZOO[name]()).merge_and_unload()
    model = adapted(case, branches=["text"])
    expected, keys = logits(model, case.batch), list(ZOO[name]().model.state_dict())
    merged = model.merge_and_unload()
    assert not getattr(merged.config.get_text_config(), "tie_word_embeddings", False)
    torch.testing.assert_close(logits(merged, case.batch), expected, atol=1e-4, rtol=1e-4)
    assert list(merged.state_dict()) == keys
    merged.save_pretrained(tmp_path)
    loaded, found = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    torch.testing.assert_close(logits(loaded.eval(), case.batch), logits(merged, case.batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("udop", "scales its output"),  # its head would be scaled otherwise after a merge
        ("diffusion_gemma", "averages its table's rows"),
        ("t5gemma2", "does more than look rows up"),  # one row is beside the table
    ],
)
def test_merge_refused(name: str, because: str) -> None:
    """A merge is refused where a changed table would not give the adapted model's output. The adapted model
    stays unchanged."""
    case = ZOO[name]()
    assert name != "udop" or untying_changes(case.model, case.batch)
    check_merge_refused(case, because)


def check_merge_refused(case: Case, because: str) -> None:
    model = adapted(case)
    expected = logits(model, case.batch)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=because) as error:
            merge()
        part = type(case.model.language_model if "Blip" in type(case.model).__name__ else case.model).__name__
        assert_message(error.value, part.removesuffix("ForConditionalGeneration"), "unload()")
    assert_equal(logits(model, case.batch), expected)


@each_architecture
def test_unload(name: str) -> None:
    """`unload` returns the base with its original logits and keys."""
    case = ZOO[name]()
    expected, keys = frozen_logits(case), list(case.model.state_dict())
    base = adapted(case).unload()
    assert_equal(logits(base, case.batch), expected)
    assert list(base.state_dict()) == keys
    assert not [path for path, _ in base.named_modules() if "crome" in path]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """A refused architecture raises one clear error and stays unchanged."""
    _, build = REFUSED[name]
    model = build()
    with unchanged(model), pytest.raises(ValueError, match="No vision site is known") as error:
        get_peft_model(model, CromeConfig())
    assert_message(error.value, type(model).__name__, "branches={")


def test_every_architecture_is_here() -> None:
    if f"transformers=={transformers.__version__}" not in PYPROJECT["dependency-groups"]["quickstart"]:
        pytest.skip("The zoo has the architectures of the release that pyproject.toml pins for development.")
    known = {name.removesuffix("_t5").removesuffix("_no_projection") for name in [*ZOO, *REFUSED]}
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= known
    assert not set(ZOO) & set(REFUSED)
