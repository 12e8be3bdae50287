"""Inspect an adapter by its files alone: sizes, singular values, units that do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights

from ..sharing.weight_checks import check_shapes, expected_shapes
from ..sharing.weight_file import KEY_PREFIX, read_adapter_file
from ..tuner.weights import DOWN, GATE

DEAD = 1e-3  # share of the root mean square over the units; about the rounding of bf16
UP = "crome_up"


@dataclass(frozen=True, eq=False)
class MatrixReport:
    """The numbers of one weight matrix.

    Attributes:
        singular_values: (min(d, m),), the largest first.
        unit_norms: (m,), the norm of each hidden unit's weights: a column of W_g and W_d, a row of W_u.
    """

    singular_values: torch.Tensor
    unit_norms: torch.Tensor

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values as shares of their sum; 0 for a zero matrix.

        Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
        """
        total = float(self.singular_values.sum())
        if total == 0:
            return 0.0
        shares = self.singular_values / total
        return float(torch.special.entr(shares).sum().exp())

    @property
    def is_dead(self) -> torch.Tensor:
        """(m,), bool: a unit's norm is at most `DEAD` of the root mean square over units; all in a zero matrix."""
        return self.unit_norms <= DEAD * self.unit_norms.square().mean().sqrt()


@dataclass(frozen=True, eq=False)
class BranchReport:
    """The numbers of one branch's weights.

    Attributes:
        branch: the branch's name.
        gate: W_g.
        down: W_d.
        dead_units: the hidden units that add nothing for any input.
        parameters: number of weights of W_g and W_d.
    """

    branch: str
    gate: MatrixReport
    down: MatrixReport
    dead_units: tuple[int, ...]
    parameters: int


@dataclass(frozen=True, eq=False)
class AdapterReport:
    """The contents of an adapter's directory.

    Attributes:
        source: the directory or the Hub repository.
        base_model: the model that it was trained on, if its configuration names one.
        model_type: the backbone's architecture, if it is recorded.
        gate_activation: "silu" or "sigmoid".
        dtype: dtype of the stored weights.
        hidden_size: d, the language model's embedding width.
        bottleneck_dim: m, the hidden units.
        up: W_u, which the branches share.
        branches: a report for each branch.
        parameters: number of the adapter's weights, (2·branches + 1)·d·m.
        other_parameters: number of weights stored beside them, by `modules_to_save` or trained tokens.
    """

    source: str
    base_model: str | None
    model_type: str | None
    gate_activation: str
    dtype: str
    hidden_size: int
    bottleneck_dim: int
    up: MatrixReport
    branches: tuple[BranchReport, ...]
    parameters: int
    other_parameters: int

    @property
    def is_identity(self) -> bool:
        """Whether W_u is zero, as in a new adapter, so that it changes nothing."""
        return float(self.up.singular_values[0]) == 0


def named_matrices(report: AdapterReport) -> list[tuple[str, MatrixReport]]:
    """List an adapter's matrices with their names, as in "W_g text"; W_u, which the branches share, is the first."""
    matrices = [("W_u", report.up)]
    for branch in report.branches:
        matrices += [(f"W_g {branch.branch}", branch.gate), (f"W_d {branch.branch}", branch.down)]
    return matrices


def inspect_adapter(adapter: str | Path) -> AdapterReport:
    """Read an adapter's files. No backbone is loaded, and nothing in the files is executed.

    A hidden unit of a branch is dead if its row of W_u, or its column of that branch's W_d, has a norm of at most 1e-3
    of the root mean square over all units. With SiLU the same holds for its column of W_g, since SiLU(0) is 0.

    Args:
        adapter: a directory that `save_pretrained` or `peft-crome train` has written, or such a Hub repository.
    Returns:
        Sizes, singular values and dead units of each branch.
    Raises:
        ValueError: there is no adapter, it belongs to another method, or its weight file is damaged or incomplete.
    """
    config = _read_config(str(adapter))
    file = read_adapter_file(str(adapter))
    if file is None:
        raise ValueError(
            f"{adapter} holds an adapter_config.json and no weights. Copy the directory again, with its "
            "adapter_model.safetensors."
        )
    file.check_values()
    shapes = file.crome
    stored = load_peft_weights(str(adapter), device="cpu")
    weights = {
        key.removeprefix(KEY_PREFIX).removesuffix(".weight"): value
        for key, value in stored.items()
        if key.startswith(KEY_PREFIX)
    }
    names = dict.fromkeys(
        name.removeprefix(kind) for name in weights for kind in (GATE, DOWN) if name.startswith(kind)
    )
    hidden_size = shapes.get(f"{UP}.weight", next(iter(shapes.values()))[::-1])[0]
    check_shapes(shapes, expected_shapes({name: [] for name in names}, hidden_size, config.bottleneck_dim), "itself")
    up = _matrix(weights[UP].T)
    branches = []
    for name in names:
        gate, down = _matrix(weights[GATE + name]), _matrix(weights[DOWN + name])
        dead = up.is_dead | down.is_dead
        if config.gate_activation == "silu":
            dead |= gate.is_dead
        dead_units = tuple(dead.nonzero().flatten().tolist())
        branches.append(BranchReport(name, gate, down, dead_units, 2 * hidden_size * config.bottleneck_dim))
    parameters = sum(value.numel() for value in weights.values())
    trained_on = config.trained_on or {}
    return AdapterReport(
        source=str(adapter),
        base_model=config.base_model_name_or_path or trained_on.get("name_or_path"),
        model_type=trained_on.get("model_type"),
        gate_activation=config.gate_activation,
        dtype=", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})),
        hidden_size=hidden_size,
        bottleneck_dim=config.bottleneck_dim,
        up=up,
        branches=tuple(branches),
        parameters=parameters,
        other_parameters=sum(value.numel() for value in stored.values()) - parameters,
    )


def _read_config(adapter: str) -> Any:
    """Read the adapter's configuration.

    Raises:
        ValueError: there is none, or it belongs to another method.
    """
    folder = Path(adapter)
    try:
        config = PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        if not folder.is_dir():
            if folder.is_file():
                raise ValueError(f"{adapter} is a file. Give the directory that it lies in.") from error
            raise ValueError(f"{adapter} is not a folder, and the Hub does not give it.") from error
        if (folder / "adapter_config.json").is_file():
            raise
        inside = sorted(str(file.parent) for file in folder.glob("*/adapter_config.json"))
        remedy = f"Give {' or '.join(inside)}." if inside else "Give the directory of an adapter."
        raise ValueError(f"{adapter} has no adapter_config.json. {remedy}") from error
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method != "CROME":
        raise ValueError(
            f"{adapter} is an adapter of the method {method}; peft-crome looks into those of CROME alone."
        )
    return config


def _matrix(weight: torch.Tensor) -> MatrixReport:
    """Report on a weight of (units, features)."""
    weight = weight.double()
    return MatrixReport(torch.linalg.svdvals(weight), weight.norm(dim=-1))
