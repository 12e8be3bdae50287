"""Helpers that the tuner's tests share: they attach, randomize and compare adapters."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_crome import CromeConfig
from tests.zoo.case import Batch, Case

M = 4  # bottleneck_dim of every test
BOTH = ["text", "vision"]
KEYS = ["crome_down_text", "crome_down_vision", "crome_gate_text", "crome_gate_vision", "crome_up"]
FILE_KEYS = [f"base_model.model.crome.{name}.weight" for name in KEYS]


def attach(model: nn.Module, adapter_name: str = "default", **config: Any) -> PeftModel:
    """Attach an adapter, with both branches unless `config` has others. What holds for both also holds for the
    default, which is one of them."""
    config = {"bottleneck_dim": M, "branches": BOTH, **config}
    return get_peft_model(model, CromeConfig(**config), adapter_name=adapter_name)


def crome_weight(model: nn.Module, name: str, adapter: str = "default") -> nn.Parameter:
    """Return a parameter of the adapter by its short name, such as "up" or "gate_text"."""
    return dict(model.named_parameters())[f"base_model.model.crome.crome_{name}.{adapter}.weight"]


def randomize(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    """Give W_u values, so that the adapter changes the logits."""
    up = crome_weight(model, "up", adapter)
    with torch.no_grad():
        up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)


def adapted(case: Case, adapter_name: str = "default", **config: Any) -> PeftModel:
    """Return the case's model in eval mode, with an adapter on all its branches that changes the logits."""
    model = attach(case.model, adapter_name, **{"branches": [*case.sites], **config})
    randomize(model, adapter_name)
    return model.eval()


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def untying_changes(model: nn.Module, batch: Batch) -> bool:
    """Return whether a host's logits depend on its configuration's key for a tied head, as T5's do in transformers
    4."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    before = logits(model, batch)
    try:
        for config in tied:
            config.tie_word_embeddings = False
        return not torch.equal(logits(model, batch), before)
    finally:
        for config in tied:
            config.tie_word_embeddings = True


def frozen_logits(case: Case) -> torch.Tensor:
    """Return the logits of the frozen backbone alone. Kernels that record a gradient may round differently."""
    case.model.requires_grad_(False)
    return logits(case.model, case.batch)


class Kernels(TorchDispatchMode):
    """Count the kernels that run, without views, and those for which the host waits on a device."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_mask = name.startswith("aten.index") and any(
            x is not None and x.dtype is torch.bool for x in _indices(args)
        )
        if not function.is_view:
            self.kernels[name] += 1
        if by_mask or name.split(".")[1] in self.SYNCS:
            self.syncs[name] += 1
        return function(*args, **(kwargs or {}))


def _indices(args: Any) -> list[Any]:
    return args[1] if isinstance(args[1], (list, tuple)) else []


def kernels(run: Callable[[], Any]) -> Counter[str]:
    with torch.no_grad(), Kernels() as counted:
        run()
    return counted.kernels + Counter({f"sync {name}": number for name, number in counted.syncs.items()})


def a_token(model: Any, inputs: Batch) -> Counter[str]:
    """Count the kernels of three more tokens in greedy decoding. Waits for a device have names that start with
    "sync"."""
    counts = []
    for length in (3, 6):
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        counts.append(kernels(lambda settings=settings: model.generate(**inputs, **settings)))
    counts[1].subtract(counts[0])
    return +counts[1]


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two tensors are equal bit for bit, with a readable message."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return {key: v.to(dtype) if v.is_floating_point() else v for key, v in batch.items()}


def file_keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return sorted(file.keys())


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def train_steps(model: nn.Module, batch: Batch, steps: int = 3, rate: float = 0.05) -> list[float]:
    """Train all that requires a gradient with SGD and return the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def state(model: nn.Module, folder: Path | None) -> dict[str, Any]:
    """Return everything that an error must leave unchanged."""
    files = sorted(folder.rglob("*")) if folder else []
    return {
        "modules": [(path, id(module)) for path, module in model.named_modules()],
        "requires_grad": [(path, p.requires_grad) for path, p in model.named_parameters()],
        "training": [(path, m.training) for path, m in model.named_modules()],
        "peft_config": {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()},
        "active": getattr(model, "active_adapters", None) if hasattr(model, "peft_config") else None,
        "files": {path: path.read_bytes() for path in files if path.is_file()},
        "model config": copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None,
    }


@contextmanager
def unchanged(model: nn.Module, folder: Path | None = None) -> Iterator[None]:
    before, weights = state(model, folder), snapshot(model)
    yield
    after = state(model, folder)
    for what in before:
        assert after[what] == before[what], what
    assert model.state_dict().keys() == weights.keys()
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]


def assert_message(error: BaseException, *parts: str) -> None:
    for part in parts:
        assert part in str(error), f"{part!r} is missing from: {error}"
