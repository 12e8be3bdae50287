"""Draw rows from the data sets of a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, interleave_datasets
from datasets.table import InMemoryTable

CHUNK = 1 << 16  # number of draws at a time
MOST_DRAWS = 1 << 30  # an order of 8 GiB; at 1,000 draws a second an epoch takes 12 days


def mixture_probabilities(sizes: Sequence[int], temperature: float = 2.0) -> list[float]:
    """Give the probability of each data set, proportional to N_d ** (1 / temperature).

    Args:
        sizes: number of rows in each data set, N_d.
        temperature: 1 draws by size, and 2 is the paper's square root. The larger it is, the more equal the sets are.
    Raises:
        ValueError: a set is empty, or the temperature is not positive.
    Source: CROME, arXiv 2408.06610, after InstructBLIP.

    Example:
        >>> mixture_probabilities([100, 400])
        [0.3333333333333333, 0.6666666666666666]
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a positive number: 1 by size, 2 by its square root.")
    if not all(size > 0 for size in sizes):
        raise ValueError(f"sizes={list(sizes)}: a data set without rows cannot be drawn from. Take it out.")
    # Divide by the largest, so that nothing overflows. A share too small for a float becomes 0, which `mix` refuses.
    weights = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]


def normalized(weights: Sequence[float]) -> list[float]:
    """Divide weights by their sum.

    Raises:
        ValueError: a weight is not positive, or is infinite.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights={list(weights)}; expected positive numbers.")
    shares = [weight / max(weights) for weight in weights]  # so that their sum is finite
    return [share / sum(shares) for share in shares]


def mix(sets: Sequence[Any], probabilities: Sequence[float] | None, seed: int) -> Any:
    """Mix several data sets into one. The same seed gives the same order.

    Args:
        sets: data sets from `load_rows`, streamed or not.
        probabilities: probability of drawing from each set. Rows are drawn until every row of every set has come at
            least once, so small sets come several times. None takes every row once.
        seed: seed of the draws, and of the order within each set.
    Raises:
        ValueError: a set has no rows, or is drawn so rarely that its rows would not come in 2 ** 30 draws.
    """
    for number, one in enumerate(sets):
        if isinstance(one, Dataset) and len(one) == 0:
            raise ValueError(
                f"Data set {number} of {len(sets)} (counted from 0) has no rows, so nothing can be drawn from it. "
                "Take it out, or correct its rows. `faulty: drop` leaves out those that cannot be read."
            )
    if len(sets) == 1:
        return sets[0]
    if not all(isinstance(one, Dataset) for one in sets):
        sets = [one.to_iterable_dataset() if isinstance(one, Dataset) else one for one in sets]
    if probabilities is None:
        return concatenate_datasets(list(sets))
    if not all(isinstance(one, Dataset) for one in sets):
        shuffled = [one.shuffle(seed=seed + number) for number, one in enumerate(sets)]
        return interleave_datasets(
            shuffled, probabilities=list(probabilities), seed=seed, stopping_strategy="all_exhausted"
        )
    _check_draws([len(one) for one in sets], probabilities)
    whole = concatenate_datasets(list(sets))
    rows = pa.array(_draw([len(one) for one in sets], probabilities, seed), type=pa.uint64())
    return selected(whole, rows)


def selected(rows: Dataset, numbers: pa.Array) -> Dataset:
    """Select rows by their numbers. `Dataset.select` would make a list of Python's numbers first."""
    if rows._indices is not None:  # the rows are a selection already
        numbers = rows._indices.column(0).take(numbers)
    return Dataset(rows.data, rows.info, rows.split, InMemoryTable.from_arrays([numbers], names=["indices"]))


def _check_draws(sizes: Sequence[int], probabilities: Sequence[float]) -> None:
    """Check that every row comes within a feasible number of draws."""
    draws = [size / share if share > 0 else math.inf for size, share in zip(sizes, probabilities, strict=True)]
    if max(draws) > MOST_DRAWS:
        number = draws.index(max(draws))
        raise ValueError(
            f"Data set {number} of {len(sizes)} (counted from 0) has {sizes[number]:,} rows and the probability "
            f"{probabilities[number]:.3g}: each of them would have come after some {draws[number]:.3g} draws, "
            f"and at most {MOST_DRAWS:,} are made. "
            "Give it a larger weight, or write mixture: {temperature: 2.0}."
        )


def _draw(sizes: Sequence[int], probabilities: Sequence[float], seed: int) -> np.ndarray:
    """Draw rows of the concatenated sets, in order.

    `interleave_datasets` draws the same rows, in lists of Python's numbers that take 150 bytes a row.
    """
    generator = np.random.default_rng(seed)
    counts = np.zeros(len(sizes), dtype=np.int64)
    chunks = []
    while (counts < sizes).any():
        chunks.append(generator.choice(len(sizes), size=CHUNK, p=probabilities).astype(np.uint16))
        counts += np.bincount(chunks[-1], minlength=len(sizes))
    drawn = np.concatenate(chunks)
    del chunks
    ends = [np.flatnonzero(drawn == number)[size - 1] for number, size in enumerate(sizes)]
    drawn = drawn[: max(ends) + 1]
    rows = np.empty(len(drawn), dtype=np.uint64)
    for number, (size, start) in enumerate(zip(sizes, np.cumsum([0, *sizes]), strict=False)):
        mine = drawn == number
        order = generator.permutation(np.arange(start, start + size, dtype=np.uint32))
        rows[mine] = np.resize(order, np.count_nonzero(mine))
    return rows
