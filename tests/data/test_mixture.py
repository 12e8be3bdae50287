"""How often each data set is drawn from, against the formula and against draws."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from peft_crome.data import mix, mixture_probabilities

PAPER = [798_245, 443_752, 9_009, 17_056, 566_747, 361_411, 109_765]  # of InstructBLIP's and BLIVA's mixture


def test_probabilities_are_proportional_to_the_square_root() -> None:
    found = mixture_probabilities(PAPER)
    expected = np.sqrt(PAPER) / np.sqrt(PAPER).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(mixture_probabilities(PAPER, 1), np.array(PAPER) / sum(PAPER), rtol=1e-12)
    np.testing.assert_allclose(mixture_probabilities(PAPER, 1e9), [1 / 7] * 7, rtol=1e-6)


def test_docs_show_them() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    for size, plain, root in zip(PAPER, mixture_probabilities(PAPER, 1), mixture_probabilities(PAPER), strict=True):
        assert f"| {size:,} | {plain:.1%} | {root:.1%} |" in page


def test_a_million_draws_follow_them() -> None:
    sizes = [9_000_000, 4_000_000, 1_000_000]
    sets = [Dataset.from_dict({"set": [number] * 1000}) for number in range(3)]
    shares = np.zeros(3)
    drawn = 0
    for seed in range(250):  # of some 4,000 draws each
        mixed = mix(sets, mixture_probabilities(sizes), seed)
        shares += np.bincount(mixed.with_format("numpy")["set"][:], minlength=3)
        drawn += len(mixed)
    assert drawn > 1_000_000
    # Each draw ends with the set that is exhausted last, the rarest.
    np.testing.assert_allclose(shares / drawn, [1 / 2, 1 / 3, 1 / 6], atol=4 * np.sqrt(0.25 / drawn) + 1e-3)


def test_same_seed_same_order_and_every_row_comes() -> None:
    sets = [Dataset.from_dict({"row": [f"{name}{i}" for i in range(size)]}) for name, size in (("a", 40), ("b", 10))]
    one, two, other = (mix(sets, mixture_probabilities([40, 10]), seed)["row"][:] for seed in (1, 1, 2))
    assert one == two != other
    assert set(one) == {f"a{i}" for i in range(40)} | {f"b{i}" for i in range(10)}
    assert len(one) > 50, "the small set comes several times"
    assert mix(sets, None, 0)["row"][:] == [row for one in sets for row in one["row"]]
    assert mix(sets[:1], None, 0) is sets[0]


def test_streamed_and_stored_sets_mix() -> None:
    sets = [Dataset.from_dict({"row": list(range(5))}), Dataset.from_dict({"row": list(range(5, 9))})]
    streamed = [sets[0].to_iterable_dataset(), sets[1]]
    drawn = [[row["row"] for row in mix(streamed, [0.5, 0.5], 3)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == set(range(9))


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="temperature=0; expected a positive number"):
        mixture_probabilities([1, 2], 0)
    with pytest.raises(ValueError, match="a data set without rows"):
        mixture_probabilities([1, 0])
