"""Test that a killed run that is started again ends as an uninterrupted one, with equal rows, losses and weights bit
for bit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_crome.training import StageError, load_recipe, read_record, train
from peft_crome.training.directory.run_folder import open_run
from tests.training.processes import KILLED, batches, run

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def two_sets(values: dict[str, Any], noise: Path, **each: Any) -> None:
    values["data"] = [{"path": str(noise / name), **each} for name in ("rows.json", "more.jsonl")]


def state(output: Path) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name in WEIGHTS for key, value in load_file(output / name).items()}


def assert_same_end(values: dict[str, Any], tmp_path: Path, kills: list[int], processes: int = 1) -> None:
    """Run a recipe once uninterrupted and once killed after each step of `kills`, and compare rows, losses and
    weights."""
    plain = {**values, "output": str(tmp_path / "plain")}
    assert run(plain, tmp_path / "plain.log", processes=processes) == [0] * processes
    for kill_at in kills:
        codes = run(values, tmp_path / "killed.log", processes=processes, kill_at=kill_at)
        assert codes[0] == KILLED, (tmp_path / "killed.log.0").read_text()[-2000:]
        assert not Path(values["output"]).exists()
    assert run(values, tmp_path / "killed.log", processes=processes) == [0] * processes
    expected, found = batches(tmp_path / "plain.log"), batches(tmp_path / "killed.log")
    assert found.keys() == expected.keys()
    assert found == expected
    whole, resumed = state(tmp_path / "plain"), state(Path(values["output"]))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


# Checkpoints are written after steps 3, 6 and 9; an epoch of one set has 3 steps.
CASES = {
    "one set": {"kills": [1, 5, 8]},
    "mixture": {"kills": [4], "workers": 2},
    "streamed": {"kills": [7]},
    "streamed, by workers": {"kills": [14], "workers": 2},
    "by length": {"kills": [7]},
}


@pytest.mark.parametrize("name", CASES)
def test_killed_run_ends_like_one_that_was_not(name: str, recipe: dict[str, Any], noise: Path, tmp_path: Path) -> None:
    recipe["training"]["arguments"]["dataloader_num_workers"] = CASES[name].get("workers", 0)
    if name == "mixture":
        two_sets(recipe, noise)
        recipe["mixture"] = {"temperature": 2.0}
    elif name.startswith("streamed"):
        two_sets(recipe, noise, streaming=True, weight=1)
        recipe["training"]["max_steps"] = 16  # more than one pass
    recipe["training"]["group_by_length"] = name == "by length"
    assert_same_end(recipe, tmp_path, kills=CASES[name]["kills"])


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_run_of_two_processes_ends_like_one_that_was_not(
    streaming: bool, recipe: dict[str, Any], noise: Path, tmp_path: Path
) -> None:
    recipe["training"] |= {"rows_per_device": 1, "max_steps": 8}
    if streaming:
        two_sets(recipe, noise, streaming=True, weight=1)
        recipe["training"]["arguments"]["dataloader_num_workers"] = 1
    assert_same_end(recipe, tmp_path, kills=[7], processes=2)


def test_order_does_not_depend_on_workers_or_processes(recipe: dict[str, Any], noise: Path, tmp_path: Path) -> None:
    """Two processes, read batch by batch in turn, read what one does, with any number of workers."""
    two_sets(recipe, noise, streaming=True, weight=1)
    recipe["training"] |= {"batch_size": 2, "rows_per_device": 1, "max_steps": 10}
    seen = []
    for workers, processes in ((0, 1), (2, 1), (2, 2)):
        recipe["training"]["arguments"]["dataloader_num_workers"] = workers
        log = tmp_path / f"{workers}-{processes}.log"
        assert run({**recipe, "output": str(log) + ".out"}, log, processes=processes) == [0] * processes
        found = batches(log)
        seen.append([digest for step in range(10) for rank in range(processes) for digest, _ in found[rank, step]])
    assert len(seen[0]) == 20
    assert seen[0] == seen[1] == seen[2]


def test_streamed_file_that_changed_is_named(recipe: dict[str, Any], noise: Path, tmp_path: Path) -> None:
    shutil.copytree(noise, tmp_path / "data")
    recipe["data"] = [{"path": str(tmp_path / "data" / "rows.json"), "streaming": True}]
    assert run(recipe, tmp_path / "log", kill_at=4) == [KILLED]
    rows = (tmp_path / "data" / "rows.json").read_text()
    (tmp_path / "data" / "rows.json").write_text(rows.replace('"id": 3,', '"id": 33,'))
    with pytest.raises(StageError, match=r"holds checkpoints of another run: content of data.*rows.json was"):
        train(load_recipe(recipe))
    (tmp_path / "data" / "rows.json").write_text(rows)
    assert train(load_recipe(recipe))["stages"][0]["resumed"]


# ---- interrupted while something is written ----


def test_every_write_leaves_the_old_state_or_the_new_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A kill leaves the files of that moment. A run continues from those of each write, also with the written file cut
    off, to the same weights."""
    recipe["training"] |= {"max_steps": 4, "save_steps": 2}
    home, states = tmp_path / "home", tmp_path / "states"
    recipe["output"] = str(home / "stage")
    codes = run(recipe, tmp_path / "log", record=(home, states))
    assert codes == [0], (tmp_path / "log.0").read_text()[-2000:]
    expected = state(Path(recipe["output"]))
    checkpoints = Path(recipe["output"] + ".checkpoints")
    ends, names = set(), sorted(path.name for path in states.iterdir())
    for name in names:
        shutil.rmtree(home)
        shutil.copytree(states / name, home)
        last = open_run(checkpoints, json.loads((checkpoints / "recipe.json").read_text()), is_main=False) if (
            checkpoints / "recipe.json"
        ).is_file() else None  # fmt: skip
        ends.add(Path(last).name if last else None)
        if Path(recipe["output"]).is_dir():
            assert read_record(recipe["output"])["stages"], name
        train(load_recipe(recipe))
        found = state(Path(recipe["output"]))
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], name
        assert sorted(path.name for path in home.iterdir()) == ["stage"], name
    assert ends == {None, "checkpoint-2", "checkpoint-4"}
    written = {name.split(" ", 1)[1].split(" (")[0] for name in names}
    written = {re.sub(r"^\.(.+)\.[0-9a-f]{32}\.tmp$", r"\1, unfinished", name) for name in written}
    assert written >= {
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete.json, unfinished",
        "crome_stage.json", "adapter_model.safetensors", "model.safetensors", "adapter_config.json",
        "recipe.json, unfinished", "README.md",
    }  # fmt: skip
