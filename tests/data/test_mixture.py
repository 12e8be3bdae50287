"""Test how often each data set is drawn from, against the formula and against draws."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from peft_crome.data import mix, mixture_probabilities
from peft_crome.data.mixture import normalized

PAPER = [798_245, 443_752, 9_009, 17_056, 566_747, 361_411, 109_765]  # of InstructBLIP's and BLIVA's mixture


def test_probabilities_are_proportional_to_the_square_root() -> None:
    found = mixture_probabilities(PAPER)
    expected = np.sqrt(PAPER) / np.sqrt(PAPER).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(mixture_probabilities(PAPER, 1), np.array(PAPER) / sum(PAPER), rtol=1e-12)
    np.testing.assert_allclose(mixture_probabilities(PAPER, 1e9), [1 / 7] * 7, rtol=1e-6)


@pytest.mark.parametrize("size", PAPER)
def test_docs_show_them(size: int) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    plain, root = (mixture_probabilities(PAPER, temperature)[PAPER.index(size)] for temperature in (1, 2))
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
    with pytest.raises(ValueError, match="temperature=nan; expected a positive number"):
        mixture_probabilities([1, 2], float("nan"))
    with pytest.raises(ValueError, match="a data set without rows"):
        mixture_probabilities([1, 0])
    with pytest.raises(ValueError, match=r"weights=\[1, inf\]; expected positive numbers"):
        normalized([1, float("inf")])
    assert normalized([1e308, 1e308]) == [0.5, 0.5], "their sum is no float"


@pytest.mark.parametrize("probabilities", [None, [0.5, 0.5]])
def test_set_without_rows_is_named(probabilities: list[float] | None) -> None:
    """A data set without rows is refused by its number. If it were not, half of the draws would be another set's first
    row."""
    full = Dataset.from_dict({"row": [1, 2, 3]})
    empty = full.select([])
    with pytest.raises(ValueError, match=r"Data set 1 of 2 \(counted from 0\) has no rows, so nothing"):
        mix([full, empty], probabilities, 0)
    with pytest.raises(ValueError, match=r"Data set 0 of 2 .* has no rows"):
        mix([empty, full.to_iterable_dataset()], probabilities, 0)


@given(
    sizes=st.lists(st.integers(1, 10**12), min_size=1, max_size=6),
    temperature=st.floats(0, exclude_min=True, allow_infinity=False),
)
def test_any_temperature_gives_probabilities(sizes: list[int], temperature: float) -> None:
    found = mixture_probabilities(sizes, temperature)
    assert sum(found) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found)
    assert (np.diff([found[at] for at in np.argsort(sizes)]) >= -1e-12).all(), "larger sets as often, or more"


@pytest.mark.parametrize("temperature", [0.1, 0.005, 5e-324])
def test_set_whose_rows_would_never_all_come_is_named(temperature: float) -> None:
    sets = [Dataset.from_dict({"row": list(range(size))}) for size in (100, 100_000)]
    probabilities = mixture_probabilities([100, 100_000], temperature)
    message = r"Data set 0 of 2 .* has 100 rows and the probability (0|1e-30): each .* Give it a larger weight"
    with pytest.raises(ValueError, match=message):
        mix(sets, probabilities, 0)
    assert len(mix(sets, mixture_probabilities([100, 100_000], 1), 0)) > 100_000
