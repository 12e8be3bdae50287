"""Each one-file example runs as its docstring says, on a tiny model, and leaves what it says it leaves."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.examples.tiny_llava import WIDTH, save_questions, save_tokenizer_and_model

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py")
BOTTLENECK_DIM = 424
SHAPES = {
    "base_model.model.crome.crome_up.weight": [WIDTH, BOTTLENECK_DIM],
    **{
        f"base_model.model.crome.crome_{kind}_{branch}.weight": [BOTTLENECK_DIM, WIDTH]
        for kind in ("gate", "down")
        for branch in ("vision",)
    },
}


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llava")
    save_tokenizer_and_model(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("easy-vqa")
    save_questions(folder)
    return folder


def launch_command(example: str) -> list[str]:
    """The words of the command in an example's docstring, `python` and continued lines included."""
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text())) or ""
    match = re.search(r"^ *(python (?:.*\\\n)*.*)$", docstring, flags=re.MULTILINE)
    assert match, f"{example}: no launch command in its docstring"
    return shlex.split(match[1])


def run(example: str, folder: Path, **options: object) -> str:
    """Run an example's launch command in `folder` with `options` in place of its own; return what it printed."""
    program, script, *arguments = launch_command(example)
    assert (program, script) == ("python", f"examples/{example}")
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]  # the last of two equal options counts
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, str(ROOT / script), *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def saved_shapes(folder: Path) -> dict[str, list[int]]:
    return {key: list(weight.shape) for key, weight in load_file(folder / "adapter_model.safetensors").items()}


def assert_trained(output: str, folder: Path) -> None:
    """Finite losses, the adapter's tensors and nothing else, and an up-projection that left zero."""
    losses = re.search(r"loss: first (\S+), last (\S+);", output)
    assert losses, output
    assert all(math.isfinite(float(loss)) for loss in losses.groups())
    assert float(losses[2]) < float(losses[1])
    assert saved_shapes(folder) == SHAPES
    assert "import peft_crome" in (folder / "README.md").read_text()
    assert load_file(folder / "adapter_model.safetensors")["base_model.model.crome.crome_up.weight"].any()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_uses_public_names(path: Path) -> None:
    source = path.read_text()
    assert 40 <= len(source.splitlines()) <= 110
    assert source.startswith("# /// script\n")
    assert launch_command(path.name)[1] == f"examples/{path.name}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith(("peft_crome", "examples", "tests")), ast.unparse(node)


@pytest.mark.slow
def test_attach_to_llava_answers_the_same_before_and_after(tiny_llava: Path, tmp_path: Path) -> None:
    output = run("attach_to_llava.py", tmp_path, model=tiny_llava, new_tokens=4)
    answers = re.findall(r"answer \w+: +(.*)", output)
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert "equal, bit for bit" in output
    assert f"trainable params: {3 * WIDTH * BOTTLENECK_DIM:,} " in output
    sites = re.findall(r"site: ([\w.]+)", output)
    assert sorted(sites) == ["model.model.multi_modal_projector"]


@pytest.mark.slow
def test_train_with_trainer_saves_an_adapter(tiny_llava: Path, questions: Path, tmp_path: Path) -> None:
    rows = [
        {
            "image": f"{image}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for question, answer, image in json.loads((questions / "questions.json").read_text())
    ]
    data, photos = tmp_path / "data.json", questions / "images"
    data.write_text(json.dumps(rows))
    output = run("train_with_trainer.py", tmp_path, model=tiny_llava, data=data, images=photos, steps=6, batch_size=4)
    assert_trained(output, tmp_path / "crome-trainer")


@pytest.mark.slow
def test_train_with_trl_saves_an_adapter(tiny_llava: Path, questions: Path, tmp_path: Path) -> None:
    output = run("train_with_trl.py", tmp_path, model=tiny_llava, data=questions, steps=6, batch_size=4)
    assert_trained(output, tmp_path / "crome-trl")


@pytest.mark.slow
def test_share_and_load_gives_equal_logits_every_way(tiny_llava: Path, tmp_path: Path) -> None:
    output = run("share_and_load.py", tmp_path, model=tiny_llava)
    compared = dict(re.findall(r"^(.*): logits equal to the (\w+) adapter's$", output, flags=re.MULTILINE))
    assert list(compared.values()) == ["first", "first", "first", "second", "first", "second"]
    assert "import peft_crome" in output
    for name in ("first", "second"):
        assert saved_shapes(tmp_path / "crome-shared" / name) == SHAPES
