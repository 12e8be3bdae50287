"""Test the commands of `peft-crome`, their exit status and their error messages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from peft_crome import __version__
from peft_crome.cli import app
from peft_crome.data import ConversationCollator, read_rows
from peft_crome.training import build, generate_answers, load_recipe, train
from peft_crome.training.model.collator import recipe_collator

runner = CliRunner()


def test_preset_is_printed_and_can_be_completed(tmp_path: Path) -> None:
    result = runner.invoke(app, ["preset", "pretrain"])
    assert result.exit_code == 0
    (tmp_path / "mine.yaml").write_text(result.stdout + "output: out\ndata: [{path: rows.json}]\n")
    assert load_recipe(tmp_path / "mine.yaml").training.epochs == 5
    result = runner.invoke(app, ["preset", "tune"])
    assert result.exit_code == 1
    assert "No preset 'tune'; expected one of ['pretrain', 'instruct', 'finetune']" in result.stderr


def test_train_then_evaluate(values: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    result = runner.invoke(app, ["train", str(recipe), "--set", "training.max_steps=3"])
    assert result.exit_code == 0, result.output
    assert "pretrain on 11 rows, to align images with text" in result.stdout
    assert "loss: " in result.stdout
    assert "3 steps in" in result.stdout
    assert "image_projection" in result.stdout
    assert "GB predicted for 4 rows of" in result.stdout
    assert "s a step, an estimate" in result.stdout
    answers = tmp_path / "answers.jsonl"
    result = runner.invoke(
        app,
        [
            "evaluate",
            values["output"],
            str(dataset),
            "--limit",
            "5",
            "--max-new-tokens",
            "2",
            "--output",
            str(answers),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "exact_match" in result.stdout
    assert len(answers.read_text().splitlines()) == 5
    scores = json.loads((tmp_path / "answers.scores.json").read_text())["scores"]
    assert scores["exact_match"]["n"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.learning_rte=1"], "training.learning_rte: no such key; did you mean 'learning_rate'?"),
        (["learning_rate=1"], "learning_rate: no such key; did you mean 'training.learning_rate'?"),
        (["training"], "is not a setting; write --set training.max_steps=100"),
        (["data.0.path=missing.json"], "missing.json is missing; expected a JSON list, JSONL or parquet"),
        (["backbones.language=not/there"], "not/there"),
        (["training.max_length=4"], "hold no whole image and answer"),
        (["output=/proc/version/x"], "/proc/version/x cannot be written: /proc/version is not a folder"),
        (["stage=finetune"], "`finetune` trains the adapter alone"),
        (["stage=finetune", "previous=nowhere", "backbones=null"], "nowhere is not the directory of a complete stage"),
    ],
)
def test_train_says_what_is_wrong(
    settings: list[str],
    message: str,
    values: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    result = runner.invoke(app, ["train", str(recipe), *(word for s in settings for word in ("--set", s))])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("query=question", "--column query=question: expected question=NAME, where NAME is your column"),
        ("question", "--column question: expected question=NAME"),
    ],
)
def test_column_says_what_stands_left_of_the_sign(column: str, message: str, tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["finetune", "model", "a.jsonl", "--output", str(tmp_path / "out"), "--column", column]
    )
    assert result.exit_code == 1
    assert message in result.stderr


def test_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "peft_crome", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "evaluate", "preset", "doctor", "plan", "inspect", "export"):
        assert command in result.stdout
        assert runner.invoke(app, [command, "-h"]).exit_code == 0
    result = runner.invoke(app, ["--version"])
    assert result.stdout == f"peft-crome {__version__}\n"


def test_evaluate_says_what_is_wrong(
    values: dict[str, Any],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(load_recipe(values))
    trained = values["output"]
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "old.scores.json").write_text("{}")
    rows = dataset.read_bytes()
    for arguments, message in (
        ([trained, str(dataset), "--output", str(tmp_path / "no" / "a.jsonl")], "there is no folder"),
        ([trained, str(dataset), "--output", str(tmp_path)], "is a folder. Name a file: --output"),
        ([trained, str(dataset), "--output", str(dataset)], "rows.json exists already, and no file is overwritten"),
        ([trained, str(dataset), "--output", str(tmp_path / "old.jsonl")], "old.scores.json exists already"),
        ([trained, str(tmp_path / "empty.json")], "empty.json holds no rows"),
        ([trained, str(dataset), "--device", "cuda"], "--device cuda: this PyTorch sees no accelerator"),
        (["runs/nix", str(dataset)], "'runs/nix' is not a folder with a model, and the Hub does not give it"),
    ):
        result = runner.invoke(app, ["evaluate", *arguments])
        assert result.exit_code == 1
        assert message in result.stderr
    assert dataset.read_bytes() == rows
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        result = runner.invoke(app, ["evaluate", trained, str(dataset), "--output", str(tmp_path / "a.jsonl")])
        assert "is not a folder that you may write to. Name another one" in result.stderr
    (Path(trained) / "adapter_model.safetensors").unlink()
    result = runner.invoke(app, ["evaluate", trained, str(dataset)])
    assert result.exit_code == 1
    assert "is incomplete: adapter_model.safetensors (missing)" in result.stderr


def test_evaluate_writes_over_nothing_and_strict_json(
    values: dict[str, Any],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`evaluate` overwrites no file and writes strict JSON. One row has no standard error, and a file that appears
    during the run stays."""
    train(load_recipe(values))
    (tmp_path / "a.jsonl.tmp").write_text("mine")
    arguments = ["evaluate", values["output"], str(dataset), "--limit", "1", "--max-new-tokens", "1", "--output"]
    result = runner.invoke(app, [*arguments, str(tmp_path / "a.jsonl")])
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout
    text = (tmp_path / "a.scores.json").read_text()
    scores = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["scores"]
    assert (scores["exact_match"]["stderr"], scores["exact_match"]["n"]) == (None, 1)
    assert (tmp_path / "a.jsonl.tmp").read_text() == "mine"
    assert (tmp_path / "a.jsonl").stat().st_mode == (tmp_path / "a.jsonl.tmp").stat().st_mode

    def meanwhile(*args: Any, **kwargs: Any) -> list[str]:
        (tmp_path / "b.jsonl").write_text("mine")
        return generate_answers(*args, **kwargs)

    monkeypatch.setattr("peft_crome.evaluation.answers.generate_answers", meanwhile)
    result = runner.invoke(app, [*arguments, str(tmp_path / "b.jsonl")])
    assert result.exit_code == 1
    assert "was made by another process meanwhile. It stays as it is" in result.stderr
    assert (tmp_path / "b.jsonl").read_text() == "mine"
    (kept,) = tmp_path.glob(".b.jsonl.*")
    assert len(kept.read_text().splitlines()) == 1


def test_evaluate_with_several_metrics(values: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    train(load_recipe(values))
    rows = json.loads(dataset.read_text())[:4]
    for row in rows:
        row |= {"answers": ["w40"] * 10, "options": ["w40", "w41", "w42", "w43"]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    folder = ["--images", f"images={dataset.parent / 'images'}", "--images", str(dataset.parent)]
    metrics = ["--metric", "vqa_accuracy", "--metric", "multiple_choice"]
    output = ["--output", str(tmp_path / "a.jsonl"), "--max-new-tokens", "2"]
    result = runner.invoke(
        app, ["evaluate", values["output"], str(tmp_path / "rows.json"), *folder, *metrics, *output]
    )
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "a.scores.json").read_text())["scores"]
    assert list(scores) == ["vqa_accuracy", "multiple_choice"]
    assert "vqa_accuracy" in result.stdout
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["options"] == rows[0]["options"]
    for wrong, message in (
        (["--metric", "spice"], "No metric 'spice'; expected one of"),
        (["--metric", "vqa_accuracy"], "vqa_accuracy: row '0' has 0 answers in `answers`"),
    ):
        result = runner.invoke(app, ["evaluate", values["output"], str(dataset), *wrong])
        assert result.exit_code == 1
        assert message in result.stderr


def test_interrupted_run_says_how_to_go_on(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_crome.training.run.train", interrupted)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = runner.invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 130
    assert "The same command continues from the last checkpoint" in result.stderr


def test_doctor_measures_and_shows_rows(values: dict[str, Any], dataset: Path) -> None:
    train(load_recipe(values))
    model = ["--model", values["output"]]
    result = runner.invoke(app, ["doctor", str(dataset), *model, "--show", "1"])
    assert "tokens in a row, up to" in result.stdout
    assert "image tokens]" in result.stdout
    assert "w40|" in result.stdout
    result = runner.invoke(app, ["doctor", str(dataset), *model, "--max-length", "5"])
    assert result.exit_code == 1
    assert "row '0': " in result.stdout
    assert "hold no whole image and answer" in result.stdout
    result = runner.invoke(app, ["doctor", str(dataset), "--show", "1"])
    assert "--show and --max-length need --model" in result.stderr


def test_doctor_reports_and_fixes_before_it_shows(
    values: dict[str, Any],
    dataset: Path,
    tmp_path: Path,
) -> None:
    """A row that cannot be encoded is named and left out. The report and the fixed copy are still made."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {"images_after_text": True}))
    rows = json.loads(dataset.read_text())
    rows[0]["conversations"][0]["value"] += " w1" * 20  # more than the Q-Former reads
    (tmp_path / "long.json").write_text(json.dumps(rows))
    said = ["doctor", str(tmp_path / "long.json"), "--images", str(dataset.parent), "--model", str(recipe)]
    result = runner.invoke(app, [*said, "--show", "2", "--fix", str(tmp_path / "fixed.json")])
    assert result.exit_code == 1
    assert not result.stderr
    assert "; 1 faulty." in result.stdout
    assert len(json.loads((tmp_path / "fixed.json").read_text())) == len(rows) - 1
    assert "row '0' cannot be shown: " in result.stdout
    assert "row '1': " in result.stdout
    assert result.stdout.index("1 faulty") < result.stdout.index("cannot be shown")


def test_doctor_goes_by_a_recipe_before_anything_is_trained(
    values: dict[str, Any],
    dataset: Path,
    tmp_path: Path,
) -> None:
    """`doctor` encodes every row as training with the recipe will. It finds what the Q-Former cannot read without
    loading weights."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {"images_after_text": True, "system": "w70"}))
    collator = recipe_collator(load_recipe(recipe))
    _, processor, _ = build(load_recipe(recipe))
    trained = ConversationCollator(processor, ends_answers=True, system="w70")
    for row in read_rows(dataset):
        assert collator.encode(row) == trained.encode(row)
    assert runner.invoke(app, ["doctor", str(dataset), "--model", str(recipe)]).exit_code == 0
    rows = json.loads(dataset.read_text())
    rows[3]["conversations"][0]["value"] += " w1" * 20
    (tmp_path / "long.json").write_text(json.dumps(rows))
    said = ["doctor", str(tmp_path / "long.json"), "--images", str(dataset.parent), "--model", str(recipe)]
    result = runner.invoke(app, said)
    assert result.exit_code == 1
    assert "row '3': the instruction has 22 tokens, and the Q-Former reads 12" in result.stdout
    assert "; 1 faulty." in result.stdout
    assert "row '0': " in runner.invoke(app, [*said, "--max-length", "5"]).stdout

    following = {**values, "stage": "instruct", "previous": values["output"], "output": str(tmp_path / "instruct")}
    recipe.write_text(yaml.safe_dump(following))
    result = runner.invoke(app, said)
    assert "does not exist yet, and it decides how rows are written" in result.stderr
    train(load_recipe({**values, "images_after_text": True}))
    assert recipe_collator(load_recipe(recipe)).processor.images_after_text
    assert "nowhere.yaml" in runner.invoke(app, [*said[:-1], "nowhere.yaml"]).stderr


def test_missing_extra_names_its_install_command() -> None:
    code = "import sys; sys.modules['typer'] = None; import peft_crome.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "peft-crome[train]"' in result.stderr
