"""Test that each one-file example runs on a tiny model as its docstring describes, and leaves the expected files."""

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
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

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


@pytest.fixture(scope="session")
def conversations(questions: Path) -> Path:
    """Write the questions in LLaVA's form beside their images, each with a rejected answer, and return the path."""
    rows = [
        {
            "image": f"{image}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
            "rejected": "no",
        }
        for question, answer, image in json.loads((questions / "questions.json").read_text())
    ]
    (questions / "images" / "data.json").write_text(json.dumps(rows))
    return questions / "images" / "data.json"


def launch_command(example: str) -> list[str]:
    """Return the words of the command in an example's docstring, with `python` and continued lines."""
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text())) or ""
    match = re.search(r"^ *(python (?:.*\\\n)*.*)$", docstring, flags=re.MULTILINE)
    assert match, f"{example}: no launch command in its docstring"
    return shlex.split(match[1])


def run(example: str, folder: Path, **options: object) -> str:
    """Run an example's launch command in `folder`, with `options` in place of its own, and return its output."""
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


def numbers(output: str, name: str = "loss") -> tuple[float, float]:
    """Return the first and the last loss or reward that an example printed."""
    found = re.search(rf"{name}: first (\S+), last (\S+);", output)
    assert found, output
    assert all(math.isfinite(float(number)) for number in found.groups())
    return float(found[1]), float(found[2])


def assert_saved(folder: Path, model: Path) -> None:
    """Assert that only the adapter's tensors are saved, and that the loaded adapter changes only a prompt with an
    image."""
    assert saved_shapes(folder) == SHAPES
    assert "import peft_crome" in (folder / "README.md").read_text()
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), folder).eval()
    for image in (None, Image.new("RGB", (28, 28), "red")):
        inputs = asked(AutoProcessor.from_pretrained(model), "What color is the circle?", image)
        with torch.no_grad():
            trained = adapted(**inputs).logits
            with adapted.disable_adapter():
                untrained = adapted(**inputs).logits
        assert torch.equal(trained, untrained) == (image is None)


def asked(processor: Any, question: str, image: Image.Image | None) -> Any:
    """Return a model's inputs for a question."""
    shown = [{"type": "image", "image": image}] if image is not None else []
    return processor.apply_chat_template(
        [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


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
@pytest.mark.parametrize("example", ["train_with_trainer", "trl_sft", "trl_dpo"])
def test_training_lowers_the_loss_and_saves_an_adapter(
    example: str, tiny_llava: Path, conversations: Path, tmp_path: Path
) -> None:
    options = {"model": tiny_llava, "data": conversations, "images": conversations.parent, "output": tmp_path / "out"}
    output = run(f"{example}.py", tmp_path, **options, steps=6, batch_size=4, learning_rate=1e-3)
    first, last = numbers(output)
    assert last < first
    if example == "trl_dpo":
        assert first == pytest.approx(math.log(2), abs=1e-4)  # a fresh adapter is its reference
    assert_saved(tmp_path / "out", tiny_llava)


@pytest.mark.slow
def test_trl_grpo_raises_the_reward(tiny_llava: Path, conversations: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    model.lm_head.weight.data.mul_(30)  # random weights would say every word alike, and hardly ever the right one
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = json.loads(conversations.read_text())
    for row in rows:
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        inputs = asked(processor, question, Image.open(conversations.parent / row["image"]))
        likely = model(**inputs).logits[0, -1].topk(20).indices
        row["conversations"][1]["value"] = next(filter(str.isalpha, map(processor.tokenizer.decode, likely)))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = {"model": tmp_path / "model", "data": tmp_path / "data.json", "images": conversations.parent}
    output = run("trl_grpo.py", tmp_path, **options, steps=10, new_tokens=1, learning_rate=1e-2)
    first, last = numbers(output, "reward")
    assert 0 < first < last
    assert_saved(tmp_path / "crome-grpo", tmp_path / "model")


@pytest.mark.slow
def test_share_and_load_gives_equal_logits_every_way(tiny_llava: Path, tmp_path: Path) -> None:
    output = run("share_and_load.py", tmp_path, model=tiny_llava)
    compared = dict(re.findall(r"^(.*): logits equal to the (\w+) adapter's$", output, flags=re.MULTILINE))
    assert list(compared.values()) == ["first", "first", "first", "second", "first", "second"]
    assert "import peft_crome" in output
    for name in ("first", "second"):
        assert saved_shapes(tmp_path / "crome-shared" / name) == SHAPES
