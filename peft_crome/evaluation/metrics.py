"""Compute the usual metrics by name, as the mean over the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from ..utils.extras import missing
from ..utils.shorten import short
from . import captions
from .multiple_choice import chosen
from .vqa import LEAST, agreement

Row = dict[str, Any]


def references(rows: Sequence[Row]) -> list[str]:
    """Return the text of each row's last turn.

    Raises:
        ValueError: the last turn of a row is not an answer.
    """
    unanswered = [row["id"] for row in rows if row["messages"][-1]["role"] != "assistant"]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} rows end without an answer to compare with, the first is {short(unanswered[0])}. Take "
            "them out."
        )
    return ["".join(part["text"] for part in row["messages"][-1]["content"]).strip() for row in rows]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Compute the share of answers that equal the expected ones, up to case and a final full stop.

    Returns:
        `accuracy`, a share from 0 to 1, its standard error `stderr`, and the number of rows `n`.

    Example:
        >>> exact_match(["Red.", "two"], ["red", "three"])
        {'accuracy': 0.5, 'stderr': 0.3536, 'n': 2}
    """
    if not expected:
        return {"accuracy": math.nan, "stderr": math.nan, "n": 0}
    hits = _hits(answers, expected)
    accuracy = fmean(hits)
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(hits))
    return {"accuracy": round(accuracy, 4), "stderr": round(stderr, 4), "n": len(hits)}


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".")


def _hits(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    return [float(_plain(answer) == _plain(wanted)) for answer, wanted in zip(answers, expected, strict=True)]


def _vqa(answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    for row in rows:
        people = row.get("answers") or []
        if len(people) < LEAST:
            raise ValueError(
                f"vqa_accuracy: row {short(row['id'])} has {len(people)} answers in `answers`, expected those of "
                f"several people, ten in VQAv2, {LEAST} at least. Choose --metric exact_match."
            )
    return [agreement(answer, row["answers"]) for answer, row in zip(answers, rows, strict=True)]


def _choice(answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    hits = []
    for answer, wanted, row in zip(answers, references(rows), rows, strict=True):
        options = row.get("options") or []
        right = chosen(wanted, options)
        if right is None:
            raise ValueError(
                f"multiple_choice: row {short(row['id'])} has the options {short(options)}, and its answer "
                f"{short(wanted)} names none of them. Write `options` into the row, a list of text, or choose "
                "--metric exact_match."
            )
        named = chosen(answer, options)
        hits.append(float(named is not None and options[named] == options[right]))
    return hits


def _captions(rows: Sequence[Row]) -> list[list[str]]:
    return [row.get("answers") or [text] for row, text in zip(rows, references(rows), strict=True)]


def _captioned(score: Callable[[Sequence[str], captions.References], Any]) -> Callable[..., Any]:
    def scored(answers: Sequence[str], rows: Sequence[Row]) -> Any:
        try:
            return score(answers, _captions(rows))
        except ImportError as error:
            raise missing("metrics", error.name, "A score of captions") from error

    return scored


# Scores of the rows, whose mean is the score; or a score of all rows together, with its standard error.
METRICS: dict[str, Callable[[Sequence[str], Sequence[Row]], list[float] | tuple[float, float]]] = {
    "exact_match": lambda answers, rows: _hits(answers, references(rows)),
    "vqa_accuracy": _vqa,
    "multiple_choice": _choice,
    "cider": _captioned(captions.cider),
    "rouge_l": _captioned(captions.rouge_l),
    "bleu": _captioned(captions.bleu),
    "chrf": _captioned(captions.chrf),
}


def score(
    answers: Sequence[str], rows: Sequence[Row], metrics: Sequence[str] = ("exact_match",)
) -> dict[str, dict[str, float]]:
    """Score answers by the references in their rows.

    Args:
        answers: one answer per row, from `generate_answers`.
        rows: rows of `read_rows`. `exact_match` compares with the last turn. `vqa_accuracy` compares with the list
            `answers`, and `multiple_choice` with the option that the last turn names among `options`. The caption
            metrics compare with `answers` if a row has them, and with the last turn otherwise.
        metrics: names of metrics, from `METRICS`. "cider", "rouge_l", "bleu" and "chrf" need the extra `metrics`.
    Returns:
        For each metric its score, the standard error and the number of rows. A score of 1 is usually printed as 100.
        The standard error is that of the rows' mean, and NaN for one row. "bleu" and "chrf" have no score for each
        row, so theirs comes from 1,000 resamples of the rows.
    Raises:
        ValueError: a metric is unknown, or a row lacks an input of a metric. The message names it.
        ImportError: the extra is not installed.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"No metric {unknown[0]!r}; expected one of {list(METRICS)}.")
    scores = {}
    for name in metrics:
        value, stderr = _mean(METRICS[name](answers, rows)) if rows else (math.nan, math.nan)
        scores[name] = {"score": round(value, 4), "stderr": round(stderr, 4), "n": len(rows)}
    return scores


def _mean(values: list[float] | tuple[float, float]) -> tuple[float, float]:
    if isinstance(values, tuple):
        return values
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def plain(value: float) -> float | None:
    """Convert a number for strict JSON: NaN, such as the standard error of one row, becomes None."""
    return None if math.isnan(value) else value


def check_metrics(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Check, before a model answers, that the rows have the references that the metrics need.

    Raises:
        ValueError, ImportError: as in `score`.
    """
    if rows:
        score(references(rows), rows, metrics)
