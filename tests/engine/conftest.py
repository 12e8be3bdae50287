"""Skip these tests if vLLM is not installed. The engine runs in the process of the tests, on one core."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .server import ON_ONE_CORE

RESULTS = Path(__file__).parents[2] / "build" / "vllm" / "results.json"

os.environ |= {**ON_ONE_CORE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.vllm)
        if importlib.util.find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed; make test-vllm installs it"))


@contextmanager
def engine(model: Path, dtype: str = "float32", **settings: Any) -> Iterator[Any]:
    """Run vLLM's engine with a model, and shut it down at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"max_model_len": 4096, "max_num_batched_tokens": 4096, "max_num_seqs": 8, **settings}
    settings.setdefault("limit_mm_per_prompt", {"image": 1, "video": 0})
    llm = LLM(str(model), dtype=dtype, enforce_eager=True, seed=0, **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def parameters(tokens: int, **others: Any) -> Any:
    """Return the parameters of greedy decoding for exactly this number of tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, **others)


def ask(llm: Any, requests: list[dict[str, Any]], tokens: int) -> list[list[int]]:
    """Return the greedy tokens of all requests, which run in one batch."""
    outputs = llm.generate(requests, parameters(tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[..., None]]:
    """Return a function that records a test's results. `make vllm-table` writes them into the page."""
    results: dict[str, dict[str, Any]] = {}

    def note(host: str, **values: Any) -> None:
        results.setdefault(host, {}).update(values)

    yield note
    if results:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
