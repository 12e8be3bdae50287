"""Test a run that stops in the middle and is started again: where it continues, and what it refuses to mix."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from peft_crome.training import StageError, load_recipe, train
from peft_crome.training.loop.finite import paths_of
from tests.training.tiny import weights


def test_interrupted_stage_goes_on(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies after step 4 and is started again ends with the weights of an uninterrupted run."""
    from peft_crome.training import run

    train(load_recipe({**values, "output": values["output"] + "-whole"}))

    class Die(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    class DyingTrainer(run.CromeTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Die()], **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(run, "CromeTrainer", DyingTrainer)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(values))
    assert not Path(values["output"]).exists()
    record = train(load_recipe(values))
    assert record["stages"][0]["resumed"]
    assert not (Path(values["output"]) / "recipe.json").exists()
    whole, resumed = weights(Path(values["output"] + "-whole")), weights(Path(values["output"]))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)
    assert not Path(values["output"] + ".checkpoints").exists()


def interrupt(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train all steps, die before the stage's directory is written, and return the folder of checkpoints."""
    from peft_crome.training import run

    def train_three(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs)
        raise KeyboardInterrupt

    original = run.CromeTrainer.train
    with monkeypatch.context() as patched:
        patched.setattr(run.CromeTrainer, "train", train_three)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(values))
    return Path(values["output"] + ".checkpoints")


def test_each_step_of_a_run_has_the_rate_of_the_formula(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part has the rate of the formula at every step. This holds across an interruption and with two accumulated
    batches a step."""
    from peft_crome.training import run

    peaks = {"image_projection": 1e-3, "text_projection": 1e-2, "adapter": 1e-2}
    values["training"] |= {"warmup_steps": 2, "rows_per_device": 2, "initial_learning_rate": 1e-4}
    values["training"]["learning_rates"] = {"image_projection": 1e-3}
    rates: dict[int, dict[str, float]] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            groups = kwargs["optimizer"].param_groups
            rates[state.global_step] = {group["part"]: group["lr"] for group in groups}

    class WatchedTrainer(run.CromeTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Watch()], **kwargs)

    monkeypatch.setattr(run, "CromeTrainer", WatchedTrainer)
    checkpoints = interrupt(values, monkeypatch)
    shutil.rmtree(checkpoints / "checkpoint-6")
    first, rates = rates, {}
    assert train(load_recipe(values))["stages"][0]["resumed"]
    assert (sorted(first), sorted(rates)) == ([0, 1, 2, 3, 4, 5], [3, 4, 5])
    for step, by_part in (*first.items(), *rates.items()):
        for part, peak in peaks.items():
            # Warm-up from 1e-4 of the common peak, 1e-2; then a cosine to 0 over the four steps that are left.
            share = (0.01 + 0.99 * step / 2) if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2
            assert by_part[part] == pytest.approx(peak * share, rel=1e-9), (step, part)


def test_cut_off_checkpoint_is_left_aside(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = interrupt(values, monkeypatch)
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    assert train(load_recipe(values))["stages"][0]["resumed"]


def test_checkpoints_of_another_recipe_are_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(values, monkeypatch)
    values["training"]["learning_rate"] = 1e-4
    values["adapter"]["bottleneck_dim"] = 8
    with pytest.raises(StageError) as error:
        train(load_recipe(values))
    for text in ("training.learning_rate was 0.01, is 0.0001", "adapter.bottleneck_dim was 4, is 8", ".checkpoints"):
        assert text in str(error.value)
    assert not Path(values["output"]).exists()


def test_run_that_failed_before_a_checkpoint_does_not_lock_its_folder(values: dict[str, Any]) -> None:
    values["training"] |= {"max_steps": None, "epochs": 1, "warmup_steps": 10}
    with pytest.raises(ValueError, match=r"training.warmup_steps: 10 leaves nothing of 3 steps"):
        train(load_recipe(values))
    values["training"]["warmup_steps"] = 1
    assert train(load_recipe(values))["stages"][0]["steps"] == 3


def test_harmless_keys_may_change_and_data_may_not(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(Path(values["data"][0]["path"]).read_text())
    images = str(Path(values["data"][0]["path"]).parent)
    values["data"] = [{"path": str(tmp_path / "rows.json"), "images": images}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    checkpoints = interrupt(values, monkeypatch)
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    values["training"] |= {"logging_steps": 2, "save_steps": 100}
    (tmp_path / "rows.json").write_text(json.dumps(rows[:5]))
    with pytest.raises(StageError, match=r"holds checkpoints of another run: content of data.*rows.json was"):
        train(load_recipe(values))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert train(load_recipe(values))["stages"][0]["resumed"]


def test_faulty_row_in_the_middle_of_a_run_is_fixed_and_the_run_goes_on(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An image that cannot be read stops a run after a checkpoint. Once its rows are removed, the run continues from
    that checkpoint."""
    rows = json.loads(Path(values["data"][0]["path"]).read_text())
    for name in ("red", "green", "blue", "white"):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(Path(values["data"][0]["path"]).parent / "images" / f"{name}.png", tmp_path / "images")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    values["data"] = [{"path": str(tmp_path / "rows.json")}]
    checkpoints = interrupt(values, monkeypatch)
    shutil.rmtree(checkpoints / "checkpoint-6")
    (tmp_path / "images" / "red.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Row '\d+'.*red.png"):
        train(load_recipe(values))
    (tmp_path / "rows.json").write_text(json.dumps([row for row in rows if "red" not in row.get("image", "")]))
    values["data"][0]["faulty"] = "drop"
    with pytest.raises(
        StageError, match=r"content of data.*rows.json was.*data.0.faulty was 'stop', is 'drop'.*--accept-changed-data"
    ):
        train(load_recipe(values))
    values["training"]["learning_rate"] = 1e-3
    with pytest.raises(StageError, match=r"training.learning_rate was"):
        train(load_recipe(values), accept_changed_data=True)
    values["training"] |= {"learning_rate": 1e-2, "max_length": 100}
    more = {**values, "data": [*values["data"], {"path": str(tmp_path / "more.json")}]}
    (tmp_path / "more.json").write_text(json.dumps(rows[-1:]))  # text alone
    with pytest.raises(StageError, match=r"data.1 was None, is .*more.json.*--accept-changed-data"):
        train(load_recipe(more))
    record = train(load_recipe(values), accept_changed_data=True)["stages"][0]
    assert record["resumed"]
    assert (record["steps"], record["data"][0]["rows"]) == (6, 8)
    assert "goes on with changed data" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "adapter_model.safetensors"])
def test_checkpoint_with_a_truncated_file_is_left_aside(
    name: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = interrupt(values, monkeypatch) / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[:-20])
    assert train(load_recipe(values))["stages"][0]["resumed"]
    assert "checkpoint-6 was not written in full; it is removed" in caplog.text


def test_recipe_of_checkpoints_that_cannot_be_read(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (interrupt(values, monkeypatch) / "recipe.json").write_text("{")
    with pytest.raises(StageError, match=r"it is unknown which run its checkpoints belong to. Remove that folder"):
        train(load_recipe(values))


@pytest.mark.parametrize("inside", ["checkpoint-500/model.safetensors", "notes.txt"])
def test_folder_of_another_program_is_left_alone(inside: str, values: dict[str, Any]) -> None:
    """A folder of another program is refused and left unchanged. An ordinary Trainer's checkpoints have no
    `complete.json`, but they are not unfinished ones of ours."""
    file = Path(values["output"] + ".checkpoints") / inside
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(StageError, match=rf"holds \['{inside.split('/')[0]}'\] and no recipe.json.*Move it away"):
        train(load_recipe(values))
    assert file.read_text() == "mine"
    assert [path.name for path in Path(values["output"] + ".checkpoints").iterdir()] == [inside.split("/")[0]]


def test_two_sets_of_one_path_are_told_apart(
    values: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two splits of one folder are separate data sets, so a change in the first one is detected."""

    def write(words: str) -> None:
        shutil.rmtree(tmp_path / "splits", ignore_errors=True)
        columns = {"question": ["w1"] * 4, "answer": [words, *["w2"] * 3], "image": ["images/red.png"] * 4}
        splits = {"first": columns, "second": {**columns, "answer": ["w3"] * 4}}
        DatasetDict({name: Dataset.from_dict(found) for name, found in splits.items()}).save_to_disk(
            str(tmp_path / "splits")
        )

    write("w2")
    named = {name: name for name in ("question", "answer", "image")}
    one = {"path": str(tmp_path / "splits"), "images": str(dataset.parent), "columns": named}
    values["data"] = [{**one, "split": "first"}, {**one, "split": "second"}]
    interrupt(values, monkeypatch)
    write("w4")
    with pytest.raises(StageError, match=r"content of data.0: .*splits was "):
        train(load_recipe(values))
    assert paths_of(["a"], [("x", Dataset.from_dict({"id": ["a"]})), ("x", Dataset.from_dict({"id": ["b"]}))]) == ["x"]


def test_folder_belongs_to_one_run_at_a_time(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is refused while another process holds it, and an unfinished checkpoint in it stays. When the process
    dies, even by SIGKILL, the folder is free."""
    checkpoints = interrupt(values, monkeypatch)
    writing = checkpoints / "checkpoint-9"
    writing.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from peft_crome.training.directory.run_folder import only_run\n"
        "with only_run(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(checkpoints)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(StageError, match=rf"is being written by another run \(process {other.pid} of .*Wait"):
                train(load_recipe(values))
            assert writing.is_dir()
        finally:
            other.kill()
    assert train(load_recipe(values))["stages"][0]["resumed"]
    assert not checkpoints.exists()
