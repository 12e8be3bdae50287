"""Test the command line as users start it: killed at any moment and started again, by torchrun and by accelerate."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from tests.training.test_resume import state

ALONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
ACCELERATE += ["--num_processes", "2"]  # with --cpu, accelerate starts one process unless it is given MPI
ACCELERATE += ["--main_process_port", "0"]  # any that is free


def start(launcher: list[str], values: dict[str, Any], file: Path) -> subprocess.Popen[bytes]:
    file.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "peft_crome", "train", str(file)]
    with file.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def kill(run: subprocess.Popen[bytes]) -> None:
    """Kill the command and every process that it has started, by SIGKILL."""
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.kill()
    run.wait()


def finish(launcher: list[str], values: dict[str, Any], file: Path) -> None:
    assert start(launcher, values, file).wait(timeout=180) == 0, file.with_suffix(".log").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, TORCHRUN], ids=["alone", "torchrun"])
def test_command_killed_at_any_moment_goes_on(
    launcher: list[str],
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe["training"] |= {"max_steps": 60, "save_steps": 1, "rows_per_device": 1, "warmup_steps": 1}
    finish(launcher, {**recipe, "output": str(tmp_path / "plain")}, tmp_path / "plain.yaml")
    checkpoints = Path(recipe["output"] + ".checkpoints")
    for seconds in (0.3, 0.7):  # after its first step: in the middle of a step, or of a checkpoint
        before = len(list(checkpoints.glob("checkpoint-*")))
        run = start(launcher, recipe, tmp_path / "killed.yaml")
        deadline = time.monotonic() + 120
        seen = set(checkpoints.glob("checkpoint-*")) if before else set()
        while not set(checkpoints.glob("checkpoint-*")) - seen:
            assert run.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(seconds)
        kill(run)
        assert not Path(recipe["output"]).exists(), "it was over before it was killed: give it more steps"
    finish(launcher, recipe, tmp_path / "killed.yaml")
    expected, found = state(tmp_path / "plain"), state(Path(recipe["output"]))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert json.loads((Path(recipe["output"]) / "crome_stage.json").read_text())["stages"][-1]["resumed"]


@pytest.mark.slow
def test_accelerate_launches_what_torchrun_does(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"]["max_steps"] = 3
    for name, launcher in (("torchrun", TORCHRUN), ("accelerate", ACCELERATE)):
        finish(launcher, {**recipe, "output": str(tmp_path / name)}, tmp_path / f"{name}.yaml")
    expected, found = state(tmp_path / "torchrun"), state(tmp_path / "accelerate")
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
