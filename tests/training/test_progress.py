"""Test the line that shows the progress of a run, on a terminal and in a file."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_crome.training import load_recipe, train
from peft_crome.training.loop.progress import LastLoss, ProgressLine

LINE = r"step 2/6: loss [\d.]+, [\d,]+ tokens/s, [\d.]+ GB, \d\d:\d\d left"


def test_in_a_file_each_log_is_a_line(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    values["training"] |= {"logging_steps": 2, "arguments": {}}
    record = train(load_recipe(values))["stages"][-1]
    said = capsys.readouterr()
    assert re.search(LINE, said.err)
    assert re.findall(r"^step (\d)/6: loss ([\d.]+),", said.err, re.M) == [
        (str(step), f"{loss:.4g}") for step, loss in record["losses"]
    ]
    assert len(record["losses"]) == 3
    assert "{" not in said.out


def test_continued_run_says_where_it_is_and_a_short_one_logs_its_last_loss(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"logging_steps": 100, "save_steps": 2, "arguments": {}}

    def stop(self: Any, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LastLoss, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(values))
    assert "continuing" not in capsys.readouterr().err
    record = train(load_recipe(values))["stages"][-1]
    assert "continuing from step 2 of 6" in capsys.readouterr().err
    assert [step for step, _ in record["losses"]] == [6]


def test_tokens_are_those_of_the_batches(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    count = ProgressLine.count

    def counted(self: Any, loss: Any, tokens: Any) -> None:
        count(self, loss, tokens)
        seen.append(int(tokens))

    monkeypatch.setattr(ProgressLine, "count", counted)
    values["training"] |= {"rows_per_device": 2}
    train(load_recipe(values))
    assert len(seen) == 12
    assert min(seen) > 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_one_line_and_an_error_begins_on_its_own(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("peft_crome.training.loop.progress.OFTEN", 0.0)
    values["training"]["arguments"] = {}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("at the first checkpoint")

    monkeypatch.setattr("peft_crome.training.run.CromeTrainer._save_checkpoint", fail)
    with pytest.raises(RuntimeError, match="at the first checkpoint"):
        train(load_recipe(values))
    written = terminal.getvalue()
    assert re.search(r"3/6 steps  50%\|.*\| ?, loss [\d.]+, [\d,]+ tokens/s, [\d.]+ GB, \d\d:\d\d left", written)
    assert written.endswith("\n")


@pytest.mark.slow
def test_command_line_on_a_pseudo_terminal(values: dict[str, Any], tmp_path: Path) -> None:
    """A whole run on a terminal shows the scores on their own lines and the error on its own line."""
    values["training"] |= {"arguments": {}, "learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0}
    values["evaluation"] = {"data": [{"path": values["data"][0]["path"]}], "steps": 1, "max_rows": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_crome", "train", str(tmp_path / "recipe.yaml")],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "120"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        written += data
    os.close(ours)
    assert process.wait() == 1
    text = written.decode()
    assert re.search(r"(\r|\n)(\x1b\[\w+)*step 1: rows_exact_match [\d.]+% ± [\d.]+%\r?\n", text)
    assert re.search(r"\n(\x1b\[\d+m)?Error:(\x1b\[0m)? Step \d", text)
