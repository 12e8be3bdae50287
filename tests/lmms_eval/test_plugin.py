"""Test that the released lmms-eval gets answers of an adapted model through its own command line and entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.easy_vqa.parts import cache_dir
from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from peft_crome.data import read_rows
from peft_crome.training import generate_answers, load_recipe, train
from tests.examples.tiny_llava import save_questions, save_tokenizer_and_model
from tests.lmms_eval.task import write_task

# What answering needs of it. All that it names would bring a torchvision that does not fit torch's CPU build.
RELEASE = [
    "lmms-eval==0.7.3",
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "chardet==7.7.0",
    "dataproperty==1.1.1",
    "evaluate==0.4.6",
    "filelock==3.20.0",
    "frozenlist==1.8.0",
    "loguru==0.7.3",
    "mbstrdecoder==1.1.5",
    "multidict==7.2.1",
    "pathvalidate==3.3.1",
    "propcache==0.5.4",
    "pytablewriter==1.2.1",
    "pytz==2026.6",
    "tabledata==1.3.5",
    "tcolorpy==0.1.7",
    "tenacity==9.2.1",
    "typepy==2.0.0",
    "yarl==1.25.1",
]


def install() -> Path:
    """Install the release once into its own directory, and return the directory."""
    target = cache_dir() / RELEASE[0].replace("==", "-")
    with FileLock(cache_dir() / f".{target.name}.lock"):
        if not target.is_dir():
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "--target"]
            partial = target.with_name(f".{target.name}.partial")
            done = subprocess.run(
                [*command, str(partial), *RELEASE], capture_output=True, text=True, timeout=600, check=False
            )
            if done.returncode:
                pytest.skip(f"pip could not install lmms-eval: {done.stderr.strip().splitlines()[-1:]}")
            partial.rename(target)
    return target


def ask(release: Path, home: Path, arguments: str, processes: int = 1) -> list[dict]:
    """Run the command line and return its samples."""
    output = home / f"out-{len(list(home.glob('out-*')))}"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "lmms_eval", "--model", "peft_crome", "--model_args", arguments]
    command += ["--tasks", "shapes", "--include_path", str(home / "task"), "--batch_size", "4", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(release), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*command, "--output_path", str(output), "--log_samples"],
        cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "|shapes|" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert all(f"Running on rank {rank} " in done.stdout + done.stderr for rank in range(processes))
    (samples,) = output.rglob("*_samples_shapes.jsonl")
    return sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def test_entry_point_is_where_lmms_eval_looks() -> None:
    (found,) = entry_points(group="lmms_eval.models", name="peft_crome")
    assert found.value == "peft_crome.lmms_eval:manifests"


@pytest.mark.slow
def test_command_line_gets_the_adapted_models_answers(tmp_path: Path) -> None:
    release = install()
    save_tokenizer_and_model(tmp_path / "host")
    save_questions(tmp_path / "questions")
    asked = json.loads((tmp_path / "questions" / "questions.json").read_text())[:10]
    rows = [
        {"image": str(tmp_path / "questions" / "images" / f"{number}.png"), "question": question, "answer": answer}
        for question, answer, number in asked
    ]
    write_task(tmp_path / "task", rows)
    torch.manual_seed(0)
    host = AutoModelForImageTextToText.from_pretrained(tmp_path / "host")
    host.lm_head.weight.data.mul_(30)  # words that differ
    host.save_pretrained(tmp_path / "host")
    get_peft_model(host, CromeConfig(bottleneck_dim=8, init_weights=False)).save_pretrained(tmp_path / "adapter")

    place = f"pretrained={tmp_path / 'host'}"
    samples = ask(release, tmp_path, f"{place},adapter={tmp_path / 'adapter'}")
    host = AutoModelForImageTextToText.from_pretrained(tmp_path / "host")
    model = PeftModel.from_pretrained(host, tmp_path / "adapter").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "host")
    expected = []
    for row in rows:  # one at a time, without padding
        parts = [{"type": "image", "image": Image.open(row["image"])}, {"type": "text", "text": row["question"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    found = [sample["filtered_resps"].strip() for sample in samples]
    assert found == expected
    assert [sample["target"] for sample in samples] == [row["answer"] for row in rows]
    frozen = [sample["filtered_resps"].strip() for sample in ask(release, tmp_path, place)]
    assert frozen != found
    by_its_adapter = f"pretrained={tmp_path / 'adapter'},processor={tmp_path / 'host'}"
    assert [sample["filtered_resps"].strip() for sample in ask(release, tmp_path, by_its_adapter)] == found


@pytest.mark.slow
def test_stages_directory_and_two_processes(values: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    """The command line takes the directory of a composite with a Q-Former and its adapter. With two processes, each
    one answers its share of the questions."""
    release = install()
    train(load_recipe(values))
    stage = values["output"]
    asked = [row for row in read_rows(dataset) if row["images"]]
    rows = [
        {"image": row["images"][0], "question": row["messages"][0]["content"][1]["text"], "answer": "w40"}
        for row in asked
    ]
    write_task(tmp_path / "task", rows)
    model = CromeVLMForConditionalGeneration.from_pretrained(stage).eval()
    expected = generate_answers(model, AutoProcessor.from_pretrained(stage), asked, max_new_tokens=3, batch_size=1)
    assert len(set(expected)) > 1
    for processes in (1, 2):
        samples = ask(release, tmp_path, f"pretrained={stage}", processes)
        assert [sample["filtered_resps"].strip() for sample in samples] == [answer.strip() for answer in expected]
