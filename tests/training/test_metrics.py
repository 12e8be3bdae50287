"""Test the field's metrics on worked cases, and the errors for rows that lack what a metric needs."""

import math
from typing import Any

import pytest

from peft_crome.evaluation.multiple_choice import chosen
from peft_crome.evaluation.vqa import agreement, normalize
from peft_crome.training import METRICS, exact_match, score


def row(answer: str, **more: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": [{"type": "text", "text": "what?"}]}
    return {
        "id": "7",
        "images": [],
        "messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        **more,
    }


@pytest.mark.parametrize(
    ("same", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_is_the_published_table(same: int, expected: float) -> None:
    """The accuracy of an answer that n of ten people gave equals the published table. It also equals the mean over the
    ten ways to leave one person out."""
    people = ["red"] * same + [f"other {n}" for n in range(10 - same)]
    assert agreement("red", people) == pytest.approx(expected)
    by_hand = [min(1, sum(q == "red" for j, q in enumerate(people) if j != i) / 3) for i in range(10)]
    assert agreement("Red.", people) == pytest.approx(sum(by_hand) / 10)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Yes.", "yes"),
        ("The cat", "cat"),
        ("a man and an umbrella", "man and umbrella"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("red, white/blue", "red white blue"),
        ("well-lit", "well lit"),
        ("dont know", "don't know"),
        ("man's hat", "man's hat"),
        ("10:30 a.m.", "10:30 am"),
        (" \n tab\tsep ", "tab sep"),
        ("", ""),
    ],
)
def test_vqa_answers_are_normalized(given: str, expected: str) -> None:
    assert normalize(given) == expected


OPTIONS = ["photosynthesis", "cell division", "leaf", "leaf blade"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("B", 1),
        ("b", 1),
        (" (B) ", 1),
        ("B. cell division", 1),
        ("(C) because a leaf is green", 2),
        ("C: leaf", 2),
        ("The answer is B.", 1),
        ("Answer: (d)", 3),
        ("**B**", 1),
        ("Option C is right", 2),
        ("Photosynthesis.", 0),
        ("It is cell division, I think.", 1),
        ("the leaf blade", 3),
        ("a leaf", 2),
        ("This shows (A) of the options.", 0),
        ("leaf or photosynthesis", None),
        ("E", None),
        ("A long story about nothing", None),
        ("", None),
        ("either (A) or (B)", None),
        ("(A), since (B) is wrong", 0),
        ("leaflet", None),
        ("A, B", None),
        ("a, b", None),
        ("A, B and C", None),
        ("(A) and (B)", None),
        ("(A) (B)", None),
        ("A) or B)", None),
        ("(A) and (B) are both right", None),
        ("A: no. B: yes", None),
        ("A: no, B: yes", None),
        ("A. photosynthesis\nB. cell division", None),
        ("A. Photosynthesis, B. cell division", None),
        ("A: no. The answer is B.", None),
        ("The answer is A or B", None),
        ("The answer is (A) and (B).", None),
        ("Answer: A/B", None),
        ("Option A is right, option B is not", None),
        ("B. The answer is B.", 1),
        ("B) because A is wrong", 1),
        ("B. A is wrong, and a cell is no plant.", 1),
        ("B, a cell", 1),
        ("B, A is wrong", 1),
        ("(B) and not (A)", 1),
        ("B. It is from the U.S. and D.C. area.", 1),
        ("The answer is B, since option A is wrong", 1),
        ("Option A is wrong. The answer is B.", 1),
        ("The answer is B, and a leaf is green", 1),
    ],
)
def test_choices_are_read(said: str, expected: int | None) -> None:
    assert chosen(said, OPTIONS) == expected


def test_letters_as_options_are_meant_by_their_place() -> None:
    assert chosen("A", ["C", "B", "A"]) == 0
    assert chosen("A. C", ["C", "B", "A"]) == 0


def test_letters_within_an_options_own_words_name_nothing() -> None:
    options = ["A. Wallace", "C. Darwin", "E. coli", "A and B"]
    assert [chosen(said, options) for said in ("B. C. Darwin", "A: A. Wallace", "D. A and B")] == [1, 0, 3]
    assert [chosen(said, options) for said in ("(A) and (B)", "The answer is D, A and B")] == [3, 3]
    assert chosen("B. C. Darwin, A. Wallace", options) is None


def test_scores_of_several_metrics() -> None:
    rows = [
        row("B", options=["cat", "dog"], answers=["dog"] * 10),
        row("A", options=["cat", "dog"], answers=["cat"] * 3 + ["kitten"] * 7),
    ]
    scores = score(["dog", "Cat."], rows, ["vqa_accuracy", "multiple_choice", "exact_match"])
    assert scores["vqa_accuracy"] == {"score": 0.95, "stderr": 0.05, "n": 2}
    assert scores["multiple_choice"] == {"score": 1.0, "stderr": 0.0, "n": 2}
    assert scores["exact_match"]["score"] == 0.0
    assert math.isnan(score([], [])["exact_match"]["score"])


def test_exact_match_under_both_names_is_the_same() -> None:
    answers, expected = ["Red.", "two", "x"], ["red", "three", "x"]
    rows = [row(text) for text in expected]
    assert score(answers, rows)["exact_match"]["score"] == exact_match(answers, expected)["accuracy"]


def test_rows_without_what_a_metric_compares_with_are_named() -> None:
    with pytest.raises(ValueError, match=r"vqa_accuracy: row '7' has 0 answers in `answers`.*--metric exact_match"):
        score(["a"], [row("a")], ["vqa_accuracy"])
    with pytest.raises(ValueError, match=r"multiple_choice: row '7' has the options \['x', 'y'\].*'z' names none"):
        score(["a"], [row("z", options=["x", "y"])], ["multiple_choice"])
    with pytest.raises(ValueError, match=r"No metric 'spice'; expected one of \['exact_match', 'vqa_accuracy'"):
        score(["a"], [row("a")], ["spice"])


CAPTIONS = [
    ["a man rides a brown horse", "a person on a horse"],
    ["two dogs play in the snow", "dogs running through snow", "the dogs are in snow"],
    ["a plate of food on a table"],
    ["a red bus drives down a street", "a bus on the road"],
]


@pytest.mark.parametrize("metric", ["cider", "rouge_l", "bleu", "chrf"])
def test_captions_are_scored(metric: str) -> None:
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("sacrebleu")
    rows = [row(texts[0], answers=texts) for texts in CAPTIONS]
    right = score([texts[0].capitalize() + "." for texts in CAPTIONS], rows, [metric])[metric]
    near = score(["a man on a horse", "dogs in snow", "food on a plate", "a bus"], rows, [metric])[metric]
    wrong = score(["nothing of it"] * 4, rows, [metric])[metric]
    assert right["score"] > near["score"] > wrong["score"]
    assert right["n"] == 4
    assert near["stderr"] > 0
    if metric == "rouge_l":
        assert right["score"] == 1.0


def test_rouge_l_is_the_formula() -> None:
    pytest.importorskip("pycocoevalcap")
    value = score(["a b x"], [row("a b c d")], ["rouge_l"])["rouge_l"]["score"]
    precision, recall, beta = 2 / 3, 2 / 4, 1.2
    assert value == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision), abs=1e-4)


@pytest.mark.parametrize("metric", ["bleu", "cider"])
def test_caption_scores_name_their_extra(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sacrebleu.metrics.bleu", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "peft-crome\[metrics\]"'):
        score(["a"], [row("a")], [metric])


def test_all_metrics_are_in_the_docs() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in METRICS)
