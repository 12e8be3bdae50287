"""Test the gated bottleneck against its equation, and the containers that a site may return."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peft_crome import CromeConfig, CromeLayer
from peft_crome.tuner import CromeWeights
from tests.tuner.helpers import BOTH, assert_equal

D, M_HIDDEN = 6, 4


class Site(nn.Module):
    """Return the input unchanged."""

    def forward(self, output: Any) -> Any:
        return output


def make_layer(
    *, adapters: dict[str, CromeConfig] | None = None, branch: str = "vision", width: int = D, random: bool = True
) -> CromeLayer:
    weights = CromeWeights()
    for i, (name, config) in enumerate((adapters or {"default": CromeConfig(bottleneck_dim=M_HIDDEN)}).items()):
        weights.add(name, config, ["text", "vision"], width, 0.7)
        if random:
            nn.init.normal_(weights.crome_up[name].weight, generator=torch.Generator().manual_seed(i))
    layer = CromeLayer(Site(), weights, width)
    layer.branches_of = {name: {branch: []} for name in weights.crome_up}
    layer.set_adapter(list(weights.crome_up))
    weights.eval()
    return layer.eval()


def by_hand(layer: CromeLayer, x: torch.Tensor, name: str = "default", activation: str = "silu") -> torch.Tensor:
    """Compute what the adapter adds: (act(x W_g) * (x W_d)) W_u. W_g and W_d are of shape (d, m), W_u is of shape (m,
    d)."""
    w_g = getattr(layer, f"crome_gate_{next(iter(layer.branches))}")[name].weight.T
    w_d = getattr(layer, f"crome_down_{next(iter(layer.branches))}")[name].weight.T
    w_u = layer.crome_up[name].weight.T
    z = torch.einsum("td,dm->tm", x, w_g)
    gate = z / (1 + torch.exp(-z)) if activation == "silu" else 1 / (1 + torch.exp(-z))
    return torch.einsum("tm,md->td", gate * torch.einsum("td,dm->tm", x, w_d), w_u)


@pytest.mark.parametrize("branch", ["text", "vision"])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_layer_equals_the_equation(activation: str, branch: str) -> None:
    config = CromeConfig(bottleneck_dim=M_HIDDEN, gate_activation=activation)
    layer = make_layer(adapters={"default": config}, branch=branch)
    x = torch.randn(5, D)
    torch.testing.assert_close(layer(x), x + by_hand(layer, x, activation=activation))


@pytest.mark.parametrize(("activation", "expected"), [("silu", [4.5231884, -1.0]), ("sigmoid", [2.7615942, -1.0])])
def test_layer_equals_numbers_worked_by_hand(activation: str, expected: list[float]) -> None:
    # d = 2, m = 1, x = [1, -1]: x W_g = 3 - 1 = 2 and x W_d = 0.5 + 0.5 = 1. sigmoid(2) = 0.8807971, silu(2) =
    # 1.7615942. Times W_u = [2, 0], plus x: [1 + 1.7615942, -1] with the sigmoid, [1 + 3.5231884, -1] with SiLU.
    layer = make_layer(adapters={"default": CromeConfig(bottleneck_dim=1, gate_activation=activation)}, width=2)
    with torch.no_grad():
        layer.crome_gate_vision["default"].weight.copy_(torch.tensor([[3.0, 1.0]]))
        layer.crome_down_vision["default"].weight.copy_(torch.tensor([[0.5, -0.5]]))
        layer.crome_up["default"].weight.copy_(torch.tensor([[2.0], [0.0]]))
    torch.testing.assert_close(layer(torch.tensor([[1.0, -1.0]])), torch.tensor([expected]))


def test_layer_sums_active_adapters() -> None:
    sigmoid = CromeConfig(bottleneck_dim=3, gate_activation="sigmoid")
    layer = make_layer(adapters={"one": CromeConfig(bottleneck_dim=M_HIDDEN), "two": sigmoid})
    x = torch.randn(5, D)
    both = x + by_hand(layer, x, "one") + by_hand(layer, x, "two", "sigmoid")
    torch.testing.assert_close(layer(x), both)
    layer.set_adapter("two")
    torch.testing.assert_close(layer(x), x + by_hand(layer, x, "two", "sigmoid"))


def test_layer_drops_only_while_training() -> None:
    layer = make_layer(adapters={"default": CromeConfig(bottleneck_dim=64, dropout=0.5)})
    x = torch.randn(5, D)
    assert_equal(layer(x), layer(x))
    layer._weights[0].train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)


def test_layer_without_dropout_is_the_same_while_training() -> None:
    layer = make_layer()
    x = torch.randn(5, D)
    expected = layer(x)
    layer._weights[0].train()
    assert_equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_computes_in_its_own_dtype_and_returns_the_site_s(dtype: torch.dtype) -> None:
    layer = make_layer()
    x = torch.randn(5, D).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    assert layer.crome_up["default"].weight.dtype == torch.float32
    assert_equal(output, (x + by_hand(layer, x.float())).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    width=st.integers(1, 40),
    hidden=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    scheme=st.sampled_from([True, "scaled", "normal"]),
)
def test_layer_is_an_identity_at_first(
    shape: list[int], width: int, hidden: int, dtype: torch.dtype, seed: int, scheme: bool | str
) -> None:
    config = CromeConfig(bottleneck_dim=hidden, init_weights=scheme)
    layer = make_layer(adapters={"default": config}, width=width, random=False)
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_equal(layer(x), x)


def test_layer_with_init_weights_false_is_no_identity() -> None:
    layer = make_layer(adapters={"default": CromeConfig(bottleneck_dim=4, init_weights=False)}, random=False)
    x = torch.randn(5, D)
    assert not torch.allclose(layer(x), x)


Pair = namedtuple("Pair", ["features", "mask"])
X, Y = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1)), torch.randn(4, D)
MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("output", "adapted_at", "kept_at"),
    [
        pytest.param(X, [()], [], id="tensor"),
        pytest.param((X, MASK), [(0,)], [(1,)], id="tuple"),
        pytest.param([X[0], Y], [(0,), (1,)], [], id="list of lengths"),
        pytest.param((X[0], Y), [(0,), (1,)], [], id="tuple of images"),
        pytest.param(Pair(X, MASK), [("features",)], [("mask",)], id="namedtuple"),
        pytest.param((X, [X, X]), [(0,)], [(1, 0), (1, 1)], id="deepstack"),
        pytest.param((MASK, X), [(1,)], [(0,)], id="second of a tuple"),
        pytest.param(
            BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=Y),
            [("pooler_output",)], [("last_hidden_state",)], id="pooler_output",
        ),
        pytest.param(
            BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=[X[0], Y]),
            [("pooler_output", 0), ("pooler_output", 1)], [("last_hidden_state",)], id="list in pooler_output",
        ),
        pytest.param(
            BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=torch.zeros(2, D + 1)),
            [("last_hidden_state",)], [("pooler_output",)], id="last_hidden_state",
        ),
    ],
)  # fmt: skip
def test_layer_keeps_the_container(output: Any, adapted_at: list[tuple], kept_at: list[tuple]) -> None:
    layer = make_layer()
    before = copy.deepcopy(output)
    result = layer(output)
    assert type(result) is type(output)
    for path in adapted_at:
        x = pick(output, path).reshape(-1, D)
        torch.testing.assert_close(pick(result, path).reshape(-1, D), x + by_hand(layer, x))
    for path in kept_at:
        assert pick(result, path) is pick(output, path)
    for path in adapted_at + kept_at:  # the site's own output is not changed in place
        assert_equal(pick(output, path), pick(before, path))


def pick(value: Any, path: tuple) -> Any:
    for part in path:
        value = getattr(value, part) if isinstance(part, str) else value[part]
    return value


@pytest.mark.parametrize(
    "output",
    [torch.zeros(2, D + 1), (torch.zeros(2, D + 1),), torch.zeros(2, D, dtype=torch.long), None, {"features": X}],
    ids=["other width", "tuple of other width", "integers", "None", "dict"],
)
def test_layer_refuses_what_holds_no_embeddings(output: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"A CROME site returned .*expected embeddings of width {D}\. Name the module"
    ):
        make_layer()(output)


def test_layer_hands_public_attributes_on() -> None:
    table = nn.Embedding(10, D, padding_idx=3)
    weights = CromeWeights()
    weights.add("default", CromeConfig(bottleneck_dim=2), ["text"], D, 1.0)
    layer = CromeLayer(table, weights, D)
    assert (layer.num_embeddings, layer.padding_idx, layer.in_features, layer.out_features) == (10, 3, 10, D)
    assert layer.weight is table.weight
    with pytest.raises(AttributeError):
        _ = layer._hf_hook
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = layer.no_such_name


@pytest.mark.parametrize("fullgraph", [True, False])
def test_layer_compiles(fullgraph: bool) -> None:
    layer = make_layer()
    x = torch.randn(5, D)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x), layer(x))


LLAVA_SIZES = {
    "llava-1.5-7b": (4096, 11008, 32, 32, 5_242_880),
    "llava-1.5-13b": (5120, 13824, 40, 40, 6_553_600),
}


@pytest.mark.parametrize("branches", [None, ["vision"], ["text", "vision"]], ids=str)
@pytest.mark.parametrize("name", LLAVA_SIZES)
def test_parameters_on_the_real_configuration(name: str, branches: list[str] | None) -> None:
    hidden, intermediate, layers, heads, both = LLAVA_SIZES[name]
    expected = both if branches == BOTH else 3 * hidden * 424
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
        text_config=tf.LlamaConfig(
            vocab_size=32064, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads,
        ),
        image_token_index=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.LlavaForConditionalGeneration(config)
        model = get_peft_model(model, CromeConfig(branches=branches))
    assert model.get_nb_trainable_parameters()[0] == expected
    assert sum(p.numel() for n, p in model.named_parameters() if "crome_" in n) == expected
