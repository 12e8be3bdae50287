"""Decide whose each failure is, in a pytest plugin for `make test-matrix`, which tests other releases of transformers.

A failure is upstream's if the host fails without an adapter, or if PEFT's LoRA fails with the same words. Both are
tried in the run itself. A test of an architecture that the release does not have is skipped.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

OPTION = "--upstream"
ABSENT = "not in this release of transformers"
# What is tried -> words in the names of the tests that do the same. Other tests fail for it if they say the same.
TRIED = {
    "build": ("",),
    "train": ("",),
    "generate": ("generate", "beams"),
    "in half precision": ("identity", "half_precision", "bfloat16"),
    "with another attention": (),
    "build its best-known checkpoint": ("known_checkpoint",),
    "add_adapter": (),
    "load a second adapter": ("trains_only_when_asked",),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the file of outcomes."""
    parser.addoption(
        OPTION, type=Path, help="write here how many tests passed and failed, and whose failures they are"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect outcomes if a file for them is given."""
    path = config.getoption(OPTION)
    if path is not None:
        config.pluginmanager.register(_Outcomes(path, hasattr(config, "workerinput")), "outcomes")


class _Outcomes:
    def __init__(self, path: Path, is_worker: bool) -> None:
        self.path = None if is_worker else path  # the process that started those of pytest-xdist writes it
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, dict[str, str]] = {"upstream": {}, "ours": {}}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[Any]:
        report = yield
        if report.failed and call.excinfo is not None:
            reason = whose(item, call.excinfo.value)
            if reason == ABSENT:
                report.outcome, report.longrepr = "skipped", (str(item.path), 0, ABSENT)
            report.upstream = reason
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            owner = "upstream" if report.upstream else "ours"
            self.failures[owner][report.nodeid] = report.upstream or str(report.longrepr).strip().splitlines()[-1]
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures["ours"][report.nodeid] = str(report.longrepr).strip().splitlines()[-1]

    def pytest_sessionfinish(self) -> None:
        outcomes = {"passed": self.counts["passed"], "skipped": self.counts["skipped"], **self.failures}
        if self.path is not None:
            self.path.write_text(json.dumps(outcomes, indent=1))


def whose(item: pytest.Item, error: BaseException) -> str:
    """Return why a failure is upstream's, or an empty string if it is ours."""
    from tests.zoo import ZOO

    spec = getattr(item, "callspec", None)
    given = [value for value in (spec.params.values() if spec else ()) if isinstance(value, str)]
    if "transformers has no attribute" in str(error) or (isinstance(error, KeyError) and error.args[0] in given):
        return ABSENT
    found = {f"{name} without an adapter": host_failures(name) for name in filter(ZOO.__contains__, given)}
    for what, failures in [*found.items(), ("LoRA", lora_failures())]:
        for tried, failure in failures.items():
            if failure == ABSENT:
                return ABSENT
            if (str(error) and str(error) in failure) or any(word in item.name for word in TRIED[tried]):
                return f"{what}: {tried}: {failure}"
    return ""


@functools.cache
def host_failures(name: str) -> dict[str, str]:
    """Return what fails on an architecture of the zoo without an adapter: each failed try and its error."""
    from tests.tuner.helpers import to_dtype
    from tests.zoo import ZOO

    try:
        case = ZOO[name]()
    except Exception as error:
        absent = isinstance(error, (AttributeError, ImportError)) and "transformers" in str(error)
        return {"build": ABSENT if absent else _words(error)}

    def generate() -> None:
        settings = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        runs = [
            case.model.generate(**case.generate_inputs(), **settings, use_cache=cached) for cached in (True, False)
        ]
        assert torch.equal(*[run.sequences for run in runs]), "other tokens with a cache than without"
        most = max((one - other).abs().max().item() for one, other in zip(*[run.logits for run in runs], strict=True))
        assert most < 1e-3, f"logits with a cache differ by up to {most:.2f} from those without"

    def in_half_precision() -> None:
        dtype = torch.bfloat16
        logits = ZOO[name]().model.to(dtype)(**to_dtype(case.batch, dtype)).logits
        assert logits.dtype == dtype, f"logits in {logits.dtype} of a model in {dtype}"

    def train() -> None:
        output = case.model(**case.batch)
        (output.loss if output.loss is not None else output.logits.square().mean()).backward()

    def other_attention() -> None:
        model = ZOO[name]().model
        model.set_attn_implementation("sdpa")
        model(**case.batch)

    def build_its_best_known() -> None:
        with torch.device("meta"):
            type(case.model)(case.known() if case.known else type(case.model.config)())

    tries: dict[str, Callable[[], Any]] = {
        "train": train,
        "in half precision": in_half_precision,
        "with another attention": other_attention,
        "build its best-known checkpoint": build_its_best_known,
    }
    if "generate" not in case.not_applicable and "no cache" not in case.not_applicable:
        tries["generate"] = generate
    return _failures(tries)


@functools.cache
def lora_failures() -> dict[str, str]:
    """Return what fails with PEFT's LoRA on a plain language model: each failed try and its error."""
    import peft
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    def plain() -> Any:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32))

    def add_adapter() -> None:
        plain().add_adapter(peft.LoraConfig(target_modules=["q_proj"]))

    def load_a_second() -> None:
        with tempfile.TemporaryDirectory() as folder:
            peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
            model = peft.PeftModel.from_pretrained(plain(), folder)
            model.load_adapter(folder, "second", is_trainable=True)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert not any(".default." in name for name in trained), "the first adapter trains, which was not asked for"

    return _failures({"add_adapter": add_adapter, "load a second adapter": load_a_second})


def _failures(tries: dict[str, Callable[[], Any]]) -> dict[str, str]:
    found = {}
    for what, run in tries.items():
        try:
            run()
        except Exception as error:
            found[what] = _words(error)
    return found


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
