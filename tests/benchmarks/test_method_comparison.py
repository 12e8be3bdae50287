"""Test the comparison of methods at tiny sizes: configurations, tasks, the plan, statistics, and the page."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.method_comparison import execute, hosts, work
from benchmarks.method_comparison.differences import paired
from benchmarks.method_comparison.execute import scored
from benchmarks.method_comparison.hosts import attach, load_trained, trained_weights
from benchmarks.method_comparison.plan import FULL, REDUCED, core_minutes, describe, needs, plan, rate_of, rates_to_try
from benchmarks.method_comparison.plots import front
from benchmarks.method_comparison.report import NOT_RUN, Report, write_report
from benchmarks.method_comparison.runs import LANGUAGE, Records, Run, read
from benchmarks.method_comparison.settings import BASE, LADDER, experiment, names
from benchmarks.method_comparison.tasks import TASKS, emoji_grids, words
from benchmarks.method_comparison.tasks.task import Task, words_alone
from examples.easy_vqa.model import Images, cached_features
from examples.easy_vqa.records import write_json
from peft_crome.evaluation import adapters_off
from tests.vlm.tiny import VOCABULARY, build, make_batch

WITHOUT_DOWNLOAD = [TASKS[name] for name in ("digits", "words", "emoji_grids")]


# ---- configurations ----


@pytest.mark.parametrize("name", names())
def test_an_experiment_is_read(name: str) -> None:
    params = experiment(name).params
    assert params.title != name
    rates = list(params.learning_rates)
    assert rates == sorted(rates)
    assert len(rates) == FULL.rates
    assert set(rates) <= set(LADDER)


def test_titles_differ_and_an_unknown_experiment_is_refused() -> None:
    assert len({experiment(name).params.title for name in names()}) == len(names())
    with pytest.raises(ValueError, match=r"No experiment 'lora/none'\. Known: base/untrained, crome/text"):
        experiment("lora/none")


@pytest.mark.parametrize("name", [name for name in names() if name != BASE])
def test_everything_that_trains_has_a_gradient_and_text_changes_as_declared(name: str) -> None:
    """Each method trains float32 weights that all get gradients, on a host in bfloat16, the dtype of all records. It
    changes text as declared, and its weights load by name onto another host."""
    batch = make_batch(build())
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    text = {"input_ids": torch.tensor([[1, 50, 60, 70]])}  # no soft token among them
    if experiment(name).params.soft_tokens:
        batch["input_ids"][:, -1] = experiment(name).params.soft_tokens[-1]
    host = build().to(torch.bfloat16)
    host.image_projection.float()
    before = host(**text).logits
    model = attach(host.requires_grad_(False), experiment(name))
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= VOCABULARY, -100)
    model(**batch, labels=labels).loss.backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert trained
    for key, value in trained.items():
        assert value.dtype == torch.float32, key
        assert value.grad is not None, key
        with torch.no_grad():
            value.add_(torch.randn_like(value))
    changed = model(**text).logits
    assert torch.equal(before, changed) != experiment(name).params.changes_text
    with adapters_off(model):
        assert torch.equal(model(**text).logits, before)
    other = build().to(torch.bfloat16)
    other.image_projection.float()
    moved = attach(other.requires_grad_(False), experiment(name))
    load_trained(moved, trained_weights(model))
    assert torch.equal(moved(**text).logits, changed)


# ---- tasks ----


@pytest.mark.parametrize("task", WITHOUT_DOWNLOAD, ids=lambda task: task.name)
def test_splits_of_a_task_share_no_image(task: Task) -> None:
    rows = task.rows(2000, seed=1)
    assert rows == task.rows(2000, seed=1)
    assert rows != task.rows(2000, seed=2)
    shown = [{row["image_id"] for row in rows}]
    for split in ("validation", "test", "shifted"):
        asked = task.questions(split, 300, seed=1)
        assert asked == task.questions(split, 300, seed=1)
        assert asked
        shown.append({row["image_id"] for row in asked})
    assert sum(map(len, shown)) == len(set.union(*shown))


@pytest.mark.parametrize("task", WITHOUT_DOWNLOAD, ids=lambda task: task.name)
def test_captions_are_of_images_of_their_split(task: Task) -> None:
    training = {row["image_id"] for row in task.rows(2000, seed=0)}
    assert {i for i, _ in task.captions("train", 400, seed=0)} <= training
    assert not {i for i, _ in task.captions("test", 400, seed=0)} & training


@pytest.mark.parametrize("task", WITHOUT_DOWNLOAD, ids=lambda task: task.name)
def test_shifted_questions_are_those_of_the_test(task: Task) -> None:
    test, shifted = (task.questions(split, 300, seed=0) for split in ("test", "shifted"))
    assert [(row["question"], row["answer"]) for row in test] == [(row["question"], row["answer"]) for row in shifted]


def test_answers_about_a_grid_are_true() -> None:
    numbers = {word: number for number, word in enumerate(emoji_grids.COUNTS)}
    for number in range(300):
        shown, category, count = emoji_grids.grid(number)
        assert len(set(shown)) == 4
        (where, name, _), (_, how_many, _), (there, answer, _) = emoji_grids.ask(number)
        place = where.removeprefix("What is at the ").removesuffix("?")
        assert shown[emoji_grids.PLACES.index(place)] == name
        assert numbers[how_many] == count == sum(emoji_grids.CATEGORY[one] == category for one in shown)
        assert (answer == "yes") == any(one in there for one in shown)


def test_words_alone_give_little_away() -> None:
    """Without images, questions can hardly be answered. Counts are drawn evenly, and half of the yes/no questions have
    the answer yes."""
    counts = Counter(emoji_grids.ask(number)[1][1] for number in range(1200))
    assert max(counts.values()) < 1.2 * min(counts.values())
    yes = sum(emoji_grids.ask(number)[2][1] == "yes" for number in range(1200))
    assert yes == pytest.approx(600, abs=60)
    assert words_alone(TASKS["words"], "test", 300, seed=0, train=1600) < 0.06
    assert 0.08 < words_alone(TASKS["digits"], "test", 300, seed=0, train=1200) < 0.15


def test_a_word_is_drawn_within_its_image() -> None:
    for number in range(60):
        for fonts in (words.SEEN, words.NEW):
            image = words.draw(number, fonts).convert("L")
            assert image.size == (words.SIDE, words.SIDE)
            edge = [image.getpixel((x, y)) for x in range(words.SIDE) for y in (0, words.SIDE - 1)]
            edge += [image.getpixel((x, y)) for y in range(words.SIDE) for x in (0, words.SIDE - 1)]
            assert min(edge) > 200
            assert image.getextrema()[0] < 100


# ---- statistics ----


def score(*hits: str, digest: str = "a") -> dict[str, Any]:
    flags = "".join(hits)
    return {"accuracy": flags.count("1") / len(flags), "n": len(flags), "hits": " ".join(hits), "digest": digest}


def test_a_paired_difference_by_hand() -> None:
    found = paired([score("1", "1", "0", "1")], [score("0", "1", "0", "0")])
    assert found.mean == 0.5
    assert found.stderr == pytest.approx(math.sqrt(4 * 0.25 * 4 / 3) / 4)
    assert found.in_stderrs == pytest.approx(found.mean / found.stderr)


def test_seeds_that_disagree_widen_the_standard_error() -> None:
    right, wrong = score(*"1" * 50), score(*"0" * 50)
    assert paired([right, right], [wrong, wrong]).stderr == 0
    found = paired([right, wrong], [wrong, wrong])
    assert found.mean == 0.5
    assert found.stderr == pytest.approx(0.5)  # the standard deviation of 1 and 0, over the root of 2


def test_questions_about_one_image_are_one_cluster() -> None:
    apart = paired([score(*"1100")], [score(*"0000")])
    together = paired([score("11", "00")], [score("00", "00")])
    assert together.mean == apart.mean
    assert together.stderr > apart.stderr


def test_scores_of_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="different questions"):
        paired([score("1")], [score("1", digest="b")])


def test_hits_are_grouped_by_image() -> None:
    rows = [(7, "yes", "yes/no"), (3, "red", "what"), (7, "no", "yes/no")]
    asked = [{"image_id": i, "question": "?", "answer": answer, "kind": kind} for i, answer, kind in rows]
    found = scored(asked, ["yes", "blue", "no"])
    assert found["hits"] == "11 0"
    assert found["accuracy"] == 2 / 3
    assert found["kinds"]["yes/no"]["accuracy"] == 1
    assert found["digest"] != scored(asked[:2], ["yes", "blue"])["digest"]


def test_the_front_has_what_nothing_beats() -> None:
    points = {"free": (0.0, 0.5), "dear": (0.6, 0.7), "worse": (0.7, 0.6), "free and worse": (0.0, 0.4)}
    assert front(points) == ["free", "dear"]


# ---- the plan ----


def sweep(name: str, accuracies: dict[float, float]) -> Records:
    return {
        Run("sweep", name, task, rate=rate): {"metrics": {"validation": {"accuracy": accuracy}}}
        for rate, accuracy in accuracies.items()
        for task in FULL.sweep_tasks
    }


def test_every_run_has_a_record_of_its_own_and_all_fit_the_budget() -> None:
    runs = plan(FULL, {})
    assert len({run.file(Path()) for run in runs}) == len(runs)
    assert len(set(runs)) == len(runs)
    methods = FULL.experiments
    assert len(methods) >= 8
    main = [run for run in runs if run.kind == "main" and run.language == LANGUAGE]
    assert len(main) == len(methods) * len(FULL.tasks) * 3
    assert sum(core_minutes(run, FULL) for run in runs) < 40 * 60
    assert describe(FULL, {}).splitlines()[-1].split()[:4] == ["all", str(len(runs)), "0", str(len(runs))]


def test_a_sweep_goes_on_while_the_best_rate_lies_at_an_end() -> None:
    name = "crome/vision"
    first = {3e-4: 0.1, 1e-3: 0.2, 3e-3: 0.3, 1e-2: 0.4}
    assert rates_to_try(name, LANGUAGE, FULL, {}) == list(first)
    assert rates_to_try(name, LANGUAGE, FULL, sweep(name, first)) == [*first, 3e-2]
    assert rates_to_try(name, LANGUAGE, FULL, sweep(name, first | {3e-2: 0.3})) == [*first, 3e-2]
    assert rates_to_try(name, LANGUAGE, FULL, sweep(name, first | {3e-2: 0.5})) == [*first, 3e-2, 1e-1]
    assert rates_to_try(name, LANGUAGE, FULL, sweep(name, first | {3e-2: 0.5, 1e-1: 0.6})) == [*first, 3e-2, 1e-1]
    falling = {3e-4: 0.4, 1e-3: 0.3, 3e-3: 0.2, 1e-2: 0.1}
    assert rates_to_try(name, LANGUAGE, FULL, sweep(name, falling)) == [1e-4, *falling]


def test_a_main_run_waits_for_its_host_and_its_sweep() -> None:
    run = Run("main", "crome/vision", "digits", seed=1)
    host = Run("host", seed=1)
    done = sweep("crome/vision", {3e-4: 0.1, 1e-3: 0.5, 3e-3: 0.5, 1e-2: 0.4})
    waiting = needs(run, FULL, {})
    assert waiting[0] == host
    assert {one.rate for one in waiting[1:]} == {3e-4, 1e-3, 3e-3, 1e-2}
    assert needs(run, FULL, done) == [host]
    assert needs(run, FULL, done | {host: {}}) == []
    assert rate_of(run, FULL, done) == 1e-3
    assert needs(Run("base", BASE, "digits"), FULL, {}) == [Run("host")]
    assert needs(host, FULL, {}) == []


def test_a_second_call_does_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Run] = []

    def do(run: Run, rate: float, sizes: Any, results: Path, output: Path) -> None:
        done.append(run)
        if len(done) == 5:
            raise KeyboardInterrupt
        write_json(run.file(results), record(run, 0.5))

    monkeypatch.setattr(work, "do", do)
    with pytest.raises(KeyboardInterrupt):
        work.work(REDUCED, tmp_path, tmp_path, processes=0)
    assert work.work(REDUCED, tmp_path, tmp_path, processes=0) == []
    runs = plan(REDUCED, read(tmp_path))
    assert done == [*runs[:5], *runs[4:]]


@pytest.mark.slow
def test_a_run_that_fails_in_its_process_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [Run("host", seed=seed, language="none") for seed in range(2)]
    monkeypatch.setattr(work, "plan", lambda sizes, records: wrong)
    assert set(work.work(REDUCED, tmp_path, tmp_path, processes=1)) == set(wrong)
    assert capsys.readouterr().err.count("KeyError: 'none'") >= 2
    assert read(tmp_path) == {}


# ---- the page ----


def record(run: Run, accuracy: float) -> dict[str, Any]:
    hits = ["1"] * round(100 * accuracy) + ["0"] * round(100 * (1 - accuracy))
    one = {**score(*hits), "kinds": {}}
    splits = {"test": one, "shifted": one}
    metrics: dict[str, Any] = {
        "host": {},
        "base": {**splits, "captions": one, "words alone": {"test": 0.1, "shifted": 0.1}},
        "sweep": {"validation": one},
        "main": {**splits, "captions of other tasks": {"words" if run.task == "digits" else "digits": one}},
        "examples": {"test": one},
        "sequence": {"right after": {"words": one, "digits": one}, "at the end": {"words": one, "digits": one}},
        "change": dict.fromkeys(("bfloat16", "nf4", "int8", "tuned", "tuned, trained again"), one),
    }[run.kind]
    if run.kind == "main":
        cost = 0.0 if run.experiment == "crome/vision" else 0.25
        metrics["text"] = {"cost": cost, "cost_stderr": 0.01, "tokens": 12_000}
    trained = {
        "num_trainable_params": 732_672,
        "file_size": 2_930_000,
        "cpu_seconds": 250.0,
        "peak_memory_bytes": 2**30,
    }
    return {
        "run_info": {"run": asdict(run), "learning_rate": 1e-3, "cpu_seconds": 300.0},
        "train_info": trained | {"settings": {"steps": 100}},
        "metrics": metrics,
    }


def test_a_page_without_records_claims_nothing(tmp_path: Path) -> None:
    write_report(REDUCED, {}, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "No run of this comparison has a record yet." in page
    assert "|" not in page
    assert "%" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.md"]


def test_a_page_shows_what_was_not_run(tmp_path: Path) -> None:
    runs = [run for run in plan(REDUCED, {}) if run.kind in ("host", "base")]
    runs.append(Run("main", "crome/vision", "digits"))
    report = Report(REDUCED, {run: record(run, 0.5) for run in runs})
    lines = report.accuracies("test").splitlines()
    assert lines[2] == "| words alone, without an image | 10.0% | 10.0% |"
    assert lines[4] == f"| {experiment('crome/vision').params.title} | {NOT_RUN} | 50.0% |"
    assert not any(experiment("lora/rank13-q-v").params.title in line for line in lines)
    assert report.differences("test") == report.winners() == "Not run yet."
    assert report.over_text("crome/vision") is None


def test_a_page_of_all_records_has_no_gap(tmp_path: Path) -> None:
    records = {run: record(run, 0.8 if run.experiment == "lora/rank13-q-v" else 0.5) for run in plan(REDUCED, {})}
    write_report(REDUCED, records, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert NOT_RUN not in page
    assert f"{len(records)} of {len(records)} runs are done." in page
    for line in page.splitlines():
        if "](images/" in line:
            assert (tmp_path / line.partition("](")[2].rstrip(")")).stat().st_size > 5_000
    assert page.count("](images/") == 2
    assert "| LoRA on q, v | -30.0 ± 4.6 | -30.0 ± 4.6 |" in page
    assert "| digits | new images | LoRA on q, v | +30.0 points, 6.5 standard errors |" in page
    assert "| +0.250 ± 0.010, +0.250 to +0.250 in 2 runs |" in page


def test_records_are_read_by_their_runs(tmp_path: Path) -> None:
    runs = plan(REDUCED, {})
    for run in runs:
        write_json(run.file(tmp_path), record(run, 0.5))
    assert set(read(tmp_path)) == set(runs)


# ---- all of it ----


@pytest.mark.slow
def test_the_reduced_form_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduced form runs on real weights and real images. The tower reads only eight images of each set."""

    def few_features(task: Task, image_processor: Any, dtype: torch.dtype) -> torch.Tensor:
        parts = []
        for part in task.images():
            read_part = cached_features(Images(f"{part.name}-first-8", 8, part.image), image_processor, dtype)
            parts.append(read_part.repeat(-(-part.count // 8), 1, 1)[: part.count])
        return torch.cat(parts)

    for module in (execute, hosts):
        monkeypatch.setattr(module, "features", few_features)
    assert work.work(REDUCED, tmp_path / "results", tmp_path / "output", processes=0) == []
    records = read(tmp_path / "results")
    assert set(records) == set(plan(REDUCED, records))
    crome, lora = (records[Run("main", name, "words")] for name in REDUCED.experiments)
    assert crome["train_info"]["num_trainable_params"] == 732_672
    assert crome["run_info"]["peft_config"]["peft_type"] == "CROME"
    assert crome["metrics"]["text"]["cost"] == 0
    assert lora["metrics"]["text"]["tokens"] == crome["metrics"]["text"]["tokens"] > 1000
    assert crome["metrics"]["test"]["digest"] == lora["metrics"]["test"]["digest"]
    assert set(records[Run("change", "crome/vision", "digits", frozen="nf4")]["metrics"]) == {
        "nf4", "bfloat16", "int8", "tuned", "tuned, trained again",
    }  # fmt: skip
    write_report(REDUCED, records, tmp_path / "page.md")
    assert NOT_RUN not in (tmp_path / "page.md").read_text()
