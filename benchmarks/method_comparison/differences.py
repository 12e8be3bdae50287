"""Compare two methods on the same questions: the difference of their accuracies and its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_crome.evaluation.text_loss import mean_by_chunk


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, with its standard error."""

    mean: float
    stderr: float

    @property
    def in_stderrs(self) -> float:
        """The mean in standard errors; 0 if all answers agree."""
        return self.mean / self.stderr if self.stderr else math.copysign(math.inf, self.mean) if self.mean else 0.0


def paired(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Difference:
    """Compute accuracy of `one` minus accuracy of `other`.

    Args:
        one, other: scores of `execute.scored`, one per seed, in the same order.
    Returns:
        The mean over seeds. The standard error is the larger of two: from the differences between images, whose
        questions are not independent, and from the differences between seeds.
    Raises:
        ValueError: the scores are of different questions.
    """
    if [score["digest"] for score in one] != [score["digest"] for score in other]:
        raise ValueError("The scores are of different questions. Pass scores of one task, split and list of seeds.")
    seeds = [_one_seed(a["hits"].split(), b["hits"].split()) for a, b in zip(one, other, strict=True)]
    means = [mean for mean, _ in seeds]
    within = math.sqrt(sum(stderr**2 for _, stderr in seeds)) / len(seeds)
    between = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Difference(statistics.mean(means), max(within, between))


def _one_seed(one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    """Return the mean difference and its standard error, with images as clusters of questions."""
    sums = [a.count("1") - b.count("1") for a, b in zip(one, other, strict=True)]
    sizes = [len(flags) for flags in one]
    return mean_by_chunk(sums, sizes)
