"""Make PEFT's own test modules test CROME. This is a pytest plugin.

It runs inside PEFT's source tree. That tree's package is also called `tests`, so the plugin imports nothing from our
`tests`. It changes each module after its import and before pytest collects its tests. Tables of methods, models and
configurations then hold CROME, and `LoraConfig` makes CROME configurations of the same modules. PEFT's test code runs
unchanged.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from not_applicable import NOT_APPLICABLE
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForImageTextToText

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration, hotswap_adapter

HOME = Path(os.environ["HF_HOME"])  # filled by hosts.py
M = 4


class Targeting(CromeConfig):
    """Make a CROME configuration from LoRA's arguments. The target modules become the sites."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        sites = kwargs.pop("target_modules", None)
        weights = kwargs.pop("init_lora_weights", kwargs.pop("init_weights", True))
        names = CromeConfig.__dataclass_fields__
        known = {key: value for key, value in kwargs.items() if key in names}
        return CromeConfig(bottleneck_dim=M, branches=branches(sites), init_weights=weights is not False, **known)


def branches(sites: list[str] | set[str] | str | None) -> dict[str, Any] | None:
    """Return the sites of each branch. Embedding tables belong to the text branch, all other modules to the vision
    branch."""
    if sites is None or isinstance(sites, str):
        return None if sites is None else {"vision": sites}
    tables = [name for name in sorted(sites) if "emb" in name]
    others = [name for name in sorted(sites) if "emb" not in name]
    return {branch: names for branch, names in {"text": tables, "vision": others}.items() if names}


CUSTOM_CASES = [
    ("Vision", "MLP", CromeConfig, {"bottleneck_dim": M, "branches": {"vision": ["lin0"]}}),
    ("Text", "EmbConv1D", CromeConfig, {"bottleneck_dim": M, "branches": {"text": ["emb"]}}),
    (
        "Vision, sigmoid, a module to save",
        "MLP",
        CromeConfig,
        {
            "bottleneck_dim": M,
            "branches": {"vision": ["lin0"]},
            "gate_activation": "sigmoid",
            "modules_to_save": ["lin1"],
        },
    ),
]


def translate(value: Any) -> Any:
    """Return the CROME counterpart of a LoRA configuration in a table of tests, and any other value as it is."""
    if isinstance(value, LoraConfig):
        words = ("target_modules", "init_lora_weights", "modules_to_save", "task_type", "trainable_token_indices")
        return Targeting(**{word: getattr(value, word) for word in words})
    return Targeting if value is LoraConfig else value


def is_foreign(value: Any) -> bool:
    """Return whether a value is a configuration of another PEFT method, or its class."""
    if isinstance(value, type):
        return issubclass(value, PeftConfig) and not issubclass(value, CromeConfig)
    return isinstance(value, PeftConfig) and not isinstance(value, CromeConfig)


def rewrite(rows: list[Any]) -> None:
    """Turn a table's LoRA rows into CROME's, and drop those of other methods."""
    kept = []
    for row in rows:
        values = row.values if isinstance(row, type(pytest.param())) else row
        cells = [translate(cell) for cell in values] if isinstance(values, (tuple, list)) else [translate(values)]
        if any(is_foreign(cell) for cell in cells) or any(is_other_kind(cell) for cell in cells):
            continue
        kept.append(tuple(cells) if isinstance(values, (tuple, list)) else cells[0])
    rows[:] = kept


def is_other_kind(cell: Any) -> bool:
    """Return whether a cell holds keyword arguments of a LoRA configuration that are not translated to CROME."""
    return isinstance(cell, dict) and bool({"target_parameters", "use_dora", "trainable_token_indices"} & set(cell))


def adapt(module: ModuleType) -> None:
    """Change a module of PEFT's tests in place."""
    name = module.__name__.rpartition(".")[2]
    # It would switch the Hub's client online, which waits minutes for what cannot be reached.
    common = sys.modules.get(f"{module.__package__}.testing_common")
    for used in (module, common):
        if hasattr(used, "hub_online_once"):
            used.hub_online_once = nullcontext
    if common is not None:
        common.LoraConfig = CromeConfig
    if name == "test_decoder_models":
        module.PEFT_DECODER_MODELS_TO_TEST[:] = module.SMALL_GRID_MODELS[:] = ["crome/tiny-llava"]
        config = {"task_type": "CAUSAL_LM", "bottleneck_dim": M}
        branches = (None, ["text", "vision"], {"text": ["embed_tokens"]})
        module.ALL_CONFIGS[:] = [(CromeConfig, config | {"branches": some}) for some in branches]
        module.TestDecoderModels.transformers_class = AutoModelForImageTextToText
        module.TestDecoderModels.prepare_inputs_for_testing = batch_of("decoder")
    elif name == "test_encoder_decoder_models":
        module.PEFT_ENCODER_DECODER_MODELS_TO_TEST[:] = ["crome/tiny-t5", "crome/tiny-bart"]
        config = {"task_type": "SEQ_2_SEQ_LM", "bottleneck_dim": M}
        module.ALL_CONFIGS[:] = [(CromeConfig, config | {"branches": some}) for some in (None, ["text", "vision"])]
        module.TestEncoderDecoderModels.transformers_class = CromeVLMForConditionalGeneration
        module.TestEncoderDecoderModels.prepare_inputs_for_testing = batch_of("encoder_decoder")
    elif name == "test_custom_models":
        module.TEST_CASES[:] = CUSTOM_CASES
        module.ALL_PEFT_CONFIG_CLASSES[:] = [Targeting]
        kinds = {"Vision": {"vision": ["lin0"]}, "Text": {"text": ["emb"]}}
        same = {kind: {"bottleneck_dim": M, "branches": sites, "init_weights": False} for kind, sites in kinds.items()}
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [(kind, kind, CromeConfig, k, k) for kind, k in same.items()]
        module.TestMultipleActiveAdapters.resolve_model_cls = lambda self, kind: (
            module.ModelEmbConv1D() if kind == "Text" else module.MLP()
        )
        rewrite(module.MIXED_ADAPTER_TEST_CASES)
    if "encoder" in name or "decoder" in name:
        module.LoraConfig = CromeConfig  # what asks whether a method does a thing asks whether it is LoRA
    else:
        for function in functions(module):
            for mark in getattr(function, "pytestmark", ()):
                if mark.name == "parametrize" and isinstance(mark.args[1], list) and mark.args[1] != CUSTOM_CASES:
                    rewrite(mark.args[1])
        for word, ours in {"LoraConfig": Targeting, "hotswap_adapter": hotswap_adapter}.items():
            if hasattr(module, word):
                setattr(module, word, ours)


def functions(module: ModuleType) -> Iterator[Any]:
    for found in vars(module).values():
        if getattr(found, "__module__", None) == module.__name__:
            yield from vars(found).values() if isinstance(found, type) else (found,)


def batch_of(kind: str) -> Any:
    batch = torch.load(HOME / f"{kind}.pt")

    def prepare_inputs_for_testing(self: Any) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in batch.items()}

    return prepare_inputs_for_testing


ADAPTED: set[str] = set()
COUNTS: dict[str, Any] = {"passed": 0, "failed": [], "skipped": Counter(), "not applicable": Counter()}


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that do not apply, and count them by reason."""
    left_out, used = [], set()
    for item in items:
        for reason, patterns in NOT_APPLICABLE.items():
            found = [pattern for pattern in patterns if re.search(pattern, item.nodeid.partition("::")[2])]
            used.update(found)
            if found:
                COUNTS["not applicable"][reason] += 1
                left_out.append(item)
                break
    COUNTS["patterns"] = sorted(used)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        COUNTS["failed"].append(report.nodeid)
    elif report.skipped:
        COUNTS["skipped"][report.longrepr[2].removeprefix("Skipped: ")] += 1
    elif report.when == "call":
        COUNTS["passed"] += 1


def pytest_sessionfinish() -> None:
    Path(os.environ["CROME_CONFORMITY_COUNTS"]).write_text(json.dumps(COUNTS))


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    module = collector.getparent(pytest.Module).obj
    if module.__name__ not in ADAPTED:
        ADAPTED.add(module.__name__)
        adapt(module)


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21.2 reads transformers' old names at every attachment, and its own settings make that an error.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        config.addinivalue_line("filterwarnings", f"ignore:`{name}` is deprecated:FutureWarning")
