"""Test evaluation during training: what it writes, and that the run is the same as without it."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor
from peft_crome.data import read_rows
from peft_crome.training import METRICS, RecipeError, build, generate_answers, load_recipe, score, train
from peft_crome.training.recipe.schema import Metric
from tests.training.test_interrupted import interrupt
from tests.training.tiny import weights


def test_a_recipes_metrics_are_those_there_are() -> None:
    assert list(get_args(Metric)) == list(METRICS)


@pytest.fixture
def questions(dataset: Path, tmp_path: Path) -> Path:
    """Return a file of four rows with the answers of ten people and options."""
    rows = json.loads(dataset.read_text())[:4]
    for row in rows:
        row |= {"answers": [row["conversations"][1]["value"]] * 10, "options": ["w40", "w41", "w42", "w43"]}
        row["image"] = str(dataset.parent / row["image"])
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "questions.json"


@pytest.fixture
def evaluated(values: dict[str, Any], dataset: Path, questions: Path) -> dict[str, Any]:
    """Return a recipe that evaluates two data sets at steps 2, 4 and 6."""
    sets: list[dict[str, Any]] = [
        {"path": str(dataset), "max_rows": None},
        {"path": str(questions), "images": "/", "metrics": ["vqa_accuracy", "multiple_choice"], "label": "vqa"},
    ]
    del sets[0]["max_rows"]
    section = {"data": sets, "steps": 2, "max_rows": 5, "max_new_tokens": 2, "batch_size": 2}
    return {**values, "evaluation": section}


def test_run_is_the_same_with_and_without(values: dict[str, Any], evaluated: dict[str, Any], tmp_path: Path) -> None:
    """Evaluation changes neither the losses nor the weights of a run. Dropout, crops and mirror images draw on all
    generators."""
    for recipe in (values, evaluated):
        recipe["images"] = {"random_crop": True, "horizontal_flip": True}
        recipe["adapter"] = {"bottleneck_dim": 4, "dropout": 0.3}
    plain = train(load_recipe(values))["stages"][-1]
    evaluated["output"] = str(tmp_path / "evaluated")
    record = train(load_recipe(evaluated))["stages"][-1]
    assert record["losses"] == plain["losses"]
    assert [step for step, _ in record["losses"]] == [1, 2, 3, 4, 5, 6]
    before, after = weights(Path(values["output"])), weights(tmp_path / "evaluated")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert plain["scores"] == []
    steps = [(found["step"], found["label"], found["metric"], found["n"]) for found in record["scores"]]
    assert steps == [
        (step, *rest)
        for step in (2, 4, 6)
        for rest in (("rows", "exact_match", 5), ("vqa", "vqa_accuracy", 4), ("vqa", "multiple_choice", 4))
    ]
    card = (tmp_path / "evaluated" / "README.md").read_text()
    assert "| stage | data | metric | score | rows | step |" in card
    assert card.count("| multiple_choice |") == 1


def test_scores_are_those_of_the_directory(evaluated: dict[str, Any], questions: Path) -> None:
    """The scores of the last step are those of the written model."""
    record = train(load_recipe(evaluated))["stages"][-1]
    model = CromeVLMForConditionalGeneration.from_pretrained(evaluated["output"])
    processor = CromeVLMProcessor.from_pretrained(evaluated["output"])
    rows = list(read_rows(questions, "/"))
    answers = generate_answers(model, processor, rows, max_new_tokens=2, progress=False)
    scores = score(answers, rows, ["vqa_accuracy", "multiple_choice"])
    last = {found["metric"]: found for found in record["scores"] if found["step"] == 6 and found["label"] == "vqa"}
    for metric, value in scores.items():
        assert {key: last[metric][key] for key in value} == value


def test_scores_before_an_interruption_are_kept(evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = interrupt(evaluated, monkeypatch)
    for file in (checkpoints / "checkpoint-6").iterdir():
        file.unlink()
    (checkpoints / "checkpoint-6").rmdir()
    evaluated["evaluation"]["steps"] = 3  # has no effect on the weights, so it may change
    record = train(load_recipe(evaluated))["stages"][-1]
    assert record["resumed"]
    assert [found["step"] for found in record["scores"] if found["metric"] == "exact_match"] == [2, 6]


def test_one_row_has_no_standard_error(evaluated: dict[str, Any]) -> None:
    evaluated["evaluation"]["max_rows"] = 1
    record = train(load_recipe(evaluated))["stages"][-1]
    assert [found["stderr"] for found in record["scores"]] == [None] * 9
    json.loads((Path(evaluated["output"]) / "crome_stage.json").read_text(), parse_constant=pytest.fail)
    assert "nan" not in (Path(evaluated["output"]) / "README.md").read_text()


@pytest.mark.parametrize("seq2seq", [False, True])
def test_answers_are_greedy_whatever_the_model_says(
    seq2seq: bool, values: dict[str, Any], dataset: Path, seq2seq_backbone: str
) -> None:
    """Each token is the likeliest one, even if the generation configuration asks for beams, lengths and penalties."""
    if seq2seq:
        values["backbones"] = {"vision": values["backbones"]["vision"], "language": seq2seq_backbone}
        values |= {"chat_template": "t5"}
    model, processor, _ = build(load_recipe(values))
    rows = list(read_rows(dataset))[:4]
    plain = generate_answers(model, processor, rows, max_new_tokens=6, progress=False)
    config = model.get_base_model().generation_config
    config.update(
        num_beams=4, early_stopping=True, no_repeat_ngram_size=1, min_length=30, repetition_penalty=5.0,
        length_penalty=2.0, min_new_tokens=5, do_sample=True, num_return_sequences=2, encoder_no_repeat_ngram_size=1,
    )  # fmt: skip
    assert generate_answers(model, processor, rows, max_new_tokens=6, progress=False) == plain


def test_head_reads_tokens_that_lie_together(values: dict[str, Any], dataset: Path) -> None:
    """The head reads contiguous hidden states. For a view, PyTorch on a CPU copies the head's weight once for each
    row."""
    model, processor, _ = build(load_recipe(values))
    seen: list[bool] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    generate_answers(model, processor, list(read_rows(dataset))[:4], max_new_tokens=2, progress=False)
    assert seen
    assert all(seen)


def test_model_is_left_in_its_mode(values: dict[str, Any], dataset: Path) -> None:
    train(load_recipe(values))
    model = CromeVLMForConditionalGeneration.from_pretrained(values["output"]).train()
    model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    processor = CromeVLMProcessor.from_pretrained(values["output"])
    generate_answers(model, processor, list(read_rows(dataset))[:2], max_new_tokens=1, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"path": "missing.json"}]}, "missing.json is missing|No such file"),
        ({"data": [{"path": "rows.json", "metrics": ["vqa_accuracy"]}]}, r"evaluation.data.0: vqa_accuracy: row '0'"),
        ({"data": [{"path": "rows.json", "metrics": ["spice"]}]}, r"evaluation.data.0.metrics.0: .*'exact_match'"),
        ({"data": [{"path": "rows.json", "metric": 1}]}, r"evaluation.data.0.metric: no such key; .* 'metrics'"),
        ({"data": [{"path": "rows.json"}] * 2}, r"\['rows'\] are the labels of several sets"),
        ({"data": [{"path": "rows.json"}], "step": 1}, r"evaluation.step: no such key; did you mean 'steps'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    changes: dict[str, Any], message: str, values: dict[str, Any], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset.parent)
    values["backbones"]["language"] = "not/looked-at"
    values["evaluation"] = changes
    with pytest.raises((RecipeError, FileNotFoundError), match=message):
        train(load_recipe(values))


def test_tensorboard_has_the_scores(evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    evaluated["training"]["arguments"] = {"disable_tqdm": True, "report_to": "tensorboard"}
    record = train(load_recipe(evaluated))["stages"][-1]
    written = EventAccumulator(evaluated["output"] + ".tensorboard").Reload()
    scalars = {event.step: event.value for event in written.Scalars("eval/vqa_multiple_choice")}
    expected = {found["step"]: found["score"] for found in record["scores"] if found["metric"] == "multiple_choice"}
    assert scalars == pytest.approx(expected)
    assert any(scalars.values())
    assert len(written.Scalars("train/loss")) == 6
    assert not Path(evaluated["output"] + ".checkpoints").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_has_the_scores(evaluated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    evaluated["training"]["arguments"] = {"disable_tqdm": True, "report_to": "wandb"}
    train(load_recipe(evaluated))
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"eval/vqa_vqa_accuracy" in content
    assert b"train/loss" in content


def test_section_in_the_docs_is_a_recipes(values: dict[str, Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(page.split("```text\n")[1].split("```")[0])
    recipe = load_recipe(
        {**values, "evaluation": shown["evaluation"], "training": values["training"] | shown["training"]}
    )
    assert recipe.evaluation is not None
    assert [questions.called for questions in recipe.evaluation.data] == ["vqav2", "ai2d"]
