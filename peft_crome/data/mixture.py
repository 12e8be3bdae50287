"""How often each data set of a mixture is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets


def mixture_probabilities(sizes: Sequence[int], temperature: float = 2.0) -> list[float]:
    """p_d proportional to N_d ** (1 / temperature).

    Args:
        sizes: rows of each data set, N_d.
        temperature: 1 draws every row as often; 2 is the paper's square root; large ones draw from every set as often.
    Raises:
        ValueError: a set is empty, or the temperature is not positive.
    Source: CROME, arXiv 2408.06610, after InstructBLIP.

    Example:
        >>> mixture_probabilities([100, 400])
        [0.3333333333333333, 0.6666666666666666]
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}; expected a positive number: 1 by size, 2 by its square root.")
    if not all(size > 0 for size in sizes):
        raise ValueError(f"sizes={list(sizes)}: a data set without rows cannot be drawn from. Take it out.")
    return normalised([size ** (1 / temperature) for size in sizes])


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        ValueError: a weight is not positive.
    """
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)}; expected positive numbers.")
    total = sum(weights)
    return [weight / total for weight in weights]


def mix(sets: Sequence[Any], probabilities: Sequence[float] | None, seed: int) -> Any:
    """One data set of several, the same for the same seed.

    Args:
        sets: of `load_rows`; streamed or not.
        probabilities: of drawing from each, in an order that the seed gives, until every row of every set has come at
            least once; small sets come several times. None: every row once.
        seed: of the draws, and of the order within each set.
    """
    if len(sets) == 1:
        return sets[0]
    if not all(isinstance(one, Dataset) for one in sets):
        sets = [one.to_iterable_dataset() if isinstance(one, Dataset) else one for one in sets]
    if probabilities is None:
        return concatenate_datasets(list(sets))
    shuffled = [one.shuffle(seed=seed + number) for number, one in enumerate(sets)]
    return interleave_datasets(
        shuffled, probabilities=list(probabilities), seed=seed, stopping_strategy="all_exhausted"
    )
