"""Score captions: CIDEr and ROUGE-L by the code of the COCO caption challenge, BLEU and chrF by sacrebleu."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

RESAMPLES = 1000
INTERVAL = 1.96  # number of standard errors in half of sacrebleu's 95% interval

References = Sequence[Sequence[str]]


def _words(text: str) -> str:
    """Lower the case and drop punctuation, much like the challenge's tokenizer, which needs Java.

    Example:
        >>> _words("A man's dog, on 2 legs.")
        "a man's dog on 2 legs"
    """
    return " ".join(re.findall(r"\w+(?:'\w+)?", text.lower()))


def _by_row(scorer: Any, answers: Sequence[str], expected: References) -> list[float]:
    captions = {number: [_words(answer)] for number, answer in enumerate(answers)}
    wanted = {number: [_words(text) for text in texts] for number, texts in enumerate(expected)}
    return [float(score) for score in scorer.compute_score(wanted, captions)[1]]


def cider(answers: Sequence[str], expected: References) -> list[float]:
    """Compute CIDEr-D of each caption, 0 to 10. A word's weight depends on how many rows have it in their references.

    Source: Vedantam et al., arXiv 1411.5726; pycocoevalcap's code.
    """
    from pycocoevalcap.cider.cider import Cider

    return _by_row(Cider(), answers, expected)


def rouge_l(answers: Sequence[str], expected: References) -> list[float]:
    """Compute ROUGE-L of each caption, 0 to 1: the longest common subsequence, favoring recall (beta 1.2)."""
    from pycocoevalcap.rouge.rouge import Rouge

    return _by_row(Rouge(), answers, expected)


def bleu(answers: Sequence[str], expected: References) -> tuple[float, float]:
    """Compute BLEU-4 of all captions together and its standard error, 0 to 1."""
    from sacrebleu.metrics.bleu import BLEU

    return _of_all(BLEU, answers, expected)


def chrf(answers: Sequence[str], expected: References) -> tuple[float, float]:
    """Compute chrF of all captions together and its standard error, 0 to 1: letter n-grams, for any language."""
    from sacrebleu.metrics.chrf import CHRF

    return _of_all(CHRF, answers, expected)


def _of_all(metric: Callable[..., Any], answers: Sequence[str], expected: References) -> tuple[float, float]:
    most = max(map(len, expected))
    streams = [[texts[number] if number < len(texts) else None for texts in expected] for number in range(most)]
    # `n_bootstrap` needs all references at once; its resampling has a fixed seed.
    result = metric().corpus_score(list(answers), streams, n_bootstrap=RESAMPLES)
    return float(result.score) / 100, float(result._ci) / INTERVAL / 100  # from numpy scalars, which JSON rejects
