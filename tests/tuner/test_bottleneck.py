"""Test what the bottleneck keeps for its backward pass, and that every way to compute its gradient gives the same
one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_crome import CromeConfig, CromeLayer
from peft_crome.tuner import CromeWeights
from tests.tuner.helpers import assert_equal

D, M, TOKENS = 512, 8, 20


def make_layer(site: nn.Module | None = None, branch: str = "vision", width: int = D, **config: Any) -> CromeLayer:
    torch.manual_seed(0)
    weights = CromeWeights()
    weights.add("default", CromeConfig(bottleneck_dim=M, init_weights=False, **config), [branch], width, 0.7)
    layer = CromeLayer(site or nn.Identity(), weights, width)
    layer.branches_of = {"default": {branch: []}}
    layer.set_adapter(["default"])
    return layer.train()


def weights_of(layer: CromeLayer) -> list[nn.Parameter]:
    return list(layer._weights[0].parameters())


def bytes_kept(layer: CromeLayer, run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes of all that autograd keeps, each storage once, without weights."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    weights = {weight.untyped_storage().data_ptr() for weight in weights_of(layer)}
    total = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert output.requires_grad
    return total


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize(
    ("dtype", "dropout", "expected"),
    [
        (torch.bfloat16, 0.0, 2 * D + 8 * M),
        (torch.bfloat16, 0.1, 2 * D + 8 * M + M),  # which hidden features are dropped
        (torch.float16, 0.0, 2 * D + 8 * M),
        (torch.float32, 0.0, 4 * D + 8 * M),
    ],
    ids=str,
)
def test_bytes_kept_for_the_backward_pass(dtype: torch.dtype, dropout: float, expected: int, activation: str) -> None:
    """A token of width d keeps itself in its dtype and two products of m features. With dropout it keeps one more byte
    for each hidden feature."""
    layer = make_layer(gate_activation=activation, dropout=dropout)
    layer._weights[0].train()
    for requires_grad in (False, True):
        x = torch.randn(TOKENS, D).to(dtype).requires_grad_(requires_grad)
        assert bytes_kept(layer, lambda x=x: layer(x)) == expected * TOKENS


def test_bytes_kept_under_autocast() -> None:
    """Under autocast a token keeps its products in half precision. Copies of the weights do not grow with the number
    of tokens."""
    layer = make_layer()

    def kept(tokens: int) -> int:
        x = torch.randn(tokens, D).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return bytes_kept(layer, lambda: layer(x))

    assert kept(2 * TOKENS) - kept(TOKENS) == (2 * D + 4 * M) * TOKENS


def test_bytes_kept_by_a_table() -> None:
    """A table keeps one more byte for each token: whether it is a placeholder. It keeps no copy of the batch's ids."""
    layer = make_layer(nn.Embedding(30, D).bfloat16().requires_grad_(False), branch="text")
    layer.placeholders = (7,)
    ids = torch.randint(30, (2, TOKENS))
    assert bytes_kept(layer, lambda: layer(ids)) == (2 * D + 8 * M + 1) * 2 * TOKENS


def plain(layer: CromeLayer, x: torch.Tensor, activation: str) -> torch.Tensor:
    """Compute the layer by plain PyTorch functions, in their usual order."""
    weights = layer._weights[0]
    gate, down = (getattr(weights, f"crome_{kind}_vision")["default"].weight for kind in ("gate", "down"))
    cast = x.to(gate.dtype)
    act = F.silu if activation == "silu" else torch.sigmoid
    hidden = act(F.linear(cast, gate)) * F.linear(cast, down)
    hidden = F.dropout(hidden, weights.settings["default"][1], weights.training)
    return (x + F.linear(hidden, weights.crome_up["default"].weight)).to(x.dtype)


def gradients(layer: CromeLayer, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of `x` and the weights."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    output = run(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [x, *weights_of(layer)], upstream)]


SHAPES = [(1,), (7,), (2, 33), (2, 3, 5)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_those_of_the_equation(dtype: torch.dtype, activation: str, dropout: float) -> None:
    layer = make_layer(gate_activation=activation, dropout=dropout)
    layer._weights[0].train()
    for shape in SHAPES:
        x = torch.randn(*shape, D).to(dtype)
        expected = gradients(layer, lambda x: plain(layer, x, activation), x)
        for found, value in zip(gradients(layer, layer, x), expected, strict=True):
            assert_equal(found, value)
        with torch.no_grad():
            torch.manual_seed(1)
            assert_equal(layer(x), expected[0])


WAYS: dict[str, Callable[[CromeLayer, torch.Tensor], torch.Tensor]] = {
    "checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "reentrant checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "compile": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.parametrize(("way", "dropout"), [*itertools.product(WAYS, (0.0,)), ("checkpoint", 0.3)])
def test_ways_to_run_it_give_the_same_gradients(way: str, dropout: float) -> None:
    layer = make_layer(dropout=dropout)
    layer._weights[0].train()
    x = torch.randn(2, 5, D).bfloat16().requires_grad_()
    for run in (layer, lambda x: WAYS[way](layer, x)):
        x.grad = None
        for weight in weights_of(layer):
            weight.grad = None
        torch.manual_seed(1)
        run(x).square().sum().backward()
        gradients = [x.grad, *(weight.grad for weight in weights_of(layer))]
        if run is layer:
            expected = gradients
    for found, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("frozen", ["nothing", "x", "crome_up", "crome_gate", "crome_down"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    layer = make_layer()
    x = torch.randn(3, D).requires_grad_(frozen != "x")
    for name, weight in layer._weights[0].named_parameters():
        weight.requires_grad_(not name.startswith(frozen))
    layer(x).sum().backward()
    for name, value in [("x", x), *layer._weights[0].named_parameters()]:
        assert (value.grad is None) == name.startswith(frozen)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_second_derivatives(activation: str) -> None:
    layer = make_layer(width=5, gate_activation=activation)
    layer._weights[0].double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    others = weights_of(layer)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *others))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *others))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
def test_transforms_of_torch_func() -> None:
    layer = make_layer()
    by_autograd = partial(plain, layer, activation="silu")
    x = torch.randn(4, 3, D)
    each = torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(x)
    x.requires_grad_()
    (alone,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(each, alone)
    along = [torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))[1] for run in (layer, by_autograd)]
    torch.testing.assert_close(along[0], along[1])
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="implement the jvp function"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))


@pytest.mark.parametrize("autocast", [nullcontext, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_no_node_where_no_gradient_is_asked_for(autocast: Any) -> None:
    layer = make_layer().requires_grad_(False)
    layer._weights[0].requires_grad_(False)
    with autocast():
        assert layer(torch.randn(3, D)).grad_fn is None
