"""Test that a recipe's options work for other kinds of models: fixed patches, a grid, tiles and an encoder-decoder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft_crome import CromeConfig
from peft_crome.cli import app
from peft_crome.evaluation.answers import generate_answers
from peft_crome.training import StageError, load_recipe, read_record, train
from peft_crome.training.loop.trainer import CromeTrainer
from peft_crome.training.model.host import load_adapted
from tests.recordings import write_sound, write_video

from . import FAMILIES

KINDS = ("llava", "qwen2_5_vl", "idefics3", "florence2")
each_kind = pytest.mark.parametrize("kind", KINDS)
RECORDINGS = {"qwen2_5_vl": "video", "smolvlm": "video", "gemma3n": "audio", "phi4_multimodal": "audio"}
each_medium = pytest.mark.parametrize(
    ("kind", "medium"),
    [
        *((kind, "image") for kind in KINDS),
        *(pytest.param(kind, medium, marks=pytest.mark.slow) for kind, medium in RECORDINGS.items()),
    ],
)
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight rows in LLaVA's form, two of them with text alone, and return their folder."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(8):
        Image.new("RGB", (60 + 30 * number, 90), (30 * number, 80, 200)).save(folder / f"{number}.png")
    write_rows(folder, "image", "png")
    return folder


@pytest.fixture(scope="module")
def recordings(data: Path) -> Path:
    """Add eight rows of videos, of several lengths, and eight rows of sounds to the folder of `data`. Return the
    folder."""
    pytest.importorskip("av", reason="videos need PyAV")
    pytest.importorskip("soundfile", reason="sound needs soundfile")
    for number in range(8):
        write_video(data / f"{number}.mp4", frames=8 + 2 * (number % 3), width=64)
        # Of one length: the towers hear a little of what pads a shorter sound in a batch.
        write_sound(data / f"{number}.wav", channels=1 + number % 3)
    write_rows(data, "video", "mp4")
    write_rows(data, "audio", "wav")
    return data


def write_rows(folder: Path, medium: str, ending: str) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(8):
        row: dict[str, Any] = {"id": f"r{number}"}
        asked = "What is two?"
        if number % 4:
            row[medium], asked = f"{number}.{ending}", f"<{medium}>\nWhat color?"
        row["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"color {number}"}]
        rows.append(row)
    (folder / f"{medium}.json").write_text(json.dumps(rows))


@pytest.fixture
def make(family_checkpoint: Callable[[Any], Path], data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """Return a function that makes a recipe's values for a kind of model and a medium. Keyword arguments set keys of
    `training`."""

    def values(kind: str, output: str = "adapter", medium: str = "image", **training: Any) -> dict[str, Any]:
        if medium != "image":
            request.getfixturevalue("recordings")
        settings = {"batch_size": 4, "max_steps": 4, "warmup_steps": 0, "save_steps": 2, "learning_rate": 1e-2}
        template = {"chat_template": "words"} if kind == "florence2" else {}
        return {
            "stage": "finetune",
            "model": str(family_checkpoint(FAMILIES[kind])),
            "data": [{"path": str(data / f"{medium}.json"), "images": str(data)}],
            "output": str(tmp_path / output),
            "training": settings | training,
            **template,
        }

    return values


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output"]) / "adapter_model.safetensors")


def run(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    train(load_recipe(values))
    trained = weights(values)
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert any(value.any() for key, value in trained.items() if "crome_up" in key)
    return trained


@each_medium
def test_a_run_that_was_killed_goes_on_to_the_bit(
    kind: str, medium: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(make(kind, "whole", medium))
    step, calls = CromeTrainer.training_step, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CromeTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(make(kind, "killed", medium)))
    record = train(load_recipe(make(kind, "killed", medium)))
    assert record["stages"][-1]["resumed"]
    found = weights(make(kind, "killed", medium))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@each_medium
def test_quantized(kind: str, medium: str, make: Make, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("bitsandbytes", reason="4-bit needs bitsandbytes")
    if kind == "gemma3n":
        reason = "transformers reads the weights of AltUp's layers itself, and they are packed"
        request.applymarker(pytest.mark.xfail(strict=True, raises=RuntimeError, reason=reason))
    values = make(kind, medium=medium)
    values["model"] = {"name": values["model"], "quantization": "4bit", "dtype": "float32"}
    run(values)
    model, _ = load_adapted(values["output"])  # as in training
    assert model.get_base_model().config.quantization_config.load_in_4bit


@each_kind
def test_gradient_checkpointing_gives_the_same_weights(kind: str, make: Make) -> None:
    expected, found = run(make(kind, "plain")), run(make(kind, "kept", gradient_checkpointing=True))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)


@each_kind
def test_streamed_mixtures(kind: str, make: Make, data: Path) -> None:
    values = make(kind)
    values["data"] = [{**values["data"][0], "streaming": True, "weight": weight} for weight in (1.0, 3.0)]
    run(values)


@each_medium
@pytest.mark.slow
def test_two_processes_with_rows_of_text(kind: str, medium: str, make: Make, tmp_path: Path) -> None:
    """Two processes have the losses of one. A batch has two rows, so in some steps one process has text alone, from
    which only the text branch learns."""
    one, values = (make(kind, name, medium, batch_size=2, logging_steps=1) for name in ("one", "two"))
    one["adapter"] = values["adapter"] = {"branches": ["text", "audio" if medium == "audio" else "vision"]}
    expected = train(load_recipe(one))["stages"][-1]["losses"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [*command, "peft_crome", "train", str(recipe)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    losses = read_record(values["output"])["stages"][-1]["losses"]
    close = 0.1 if kind == "florence2" else 1e-3  # BART's dropout is drawn by each process
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-3, rtol=close)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "idefics3"])
def test_a_plan_counts_an_image_as_the_processor_does(kind: str, make: Make) -> None:
    model = make(kind)["model"]
    processor = tf.AutoProcessor.from_pretrained(model)
    text = {"type": "text", "text": "What?"}
    shown, alone = (
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
        for content in ([{"type": "image", "image": Image.new("RGB", (640, 480))}, text], [text])
    )
    token = processor.tokenizer.convert_tokens_to_ids(FAMILIES[kind].image_token)
    fewest, most = shown["input_ids"][0].count(token), len(shown["input_ids"][0]) - len(alone["input_ids"][0])
    assert fewest > 64
    for arguments in ([model], ["--backbone", model]):
        planned = CliRunner().invoke(app, ["plan", *arguments])
        assert planned.exit_code == 0, planned.output
        row, image = map(int, re.search(r"rows of (\d+) tokens, (\d+) of them an image's", planned.stdout).groups())
        assert fewest <= image <= most + 1  # with what frames it; Idefics 3 writes a space where no image is
        assert row == image + 128


def test_a_second_task_on_top_of_the_first(make: Make) -> None:
    first = make("llava", "first")
    before = run(first)
    second = make("llava", "second", learning_rate=1e-9, initial_learning_rate=0.0, max_steps=1)
    del second["model"]
    second["previous"] = first["output"]
    record = train(load_recipe(second))
    assert len(record["stages"]) == 2
    after = weights(second)
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[key], before[key], atol=1e-7) for key in before)  # after one very small step
    with pytest.raises(StageError, match=r"adapter.bottleneck_dim: 8 in the recipe, 424 there"):
        train(load_recipe(second | {"adapter": {"bottleneck_dim": 8}, "output": f"{second['output']}-other"}))


def test_the_projector_trains_as_well(make: Make) -> None:
    values = make("llava")
    values["trains"] = ["adapter", "multi_modal_projector"]
    keys = run(values)
    assert any("multi_modal_projector" in key for key in keys)
    model, _ = load_adapted(values["output"])
    assert "multi_modal_projector" in str(model.peft_config["default"].modules_to_save)


def test_settings_of_the_processor_hold_and_are_kept(make: Make) -> None:
    values = make("idefics3")
    values["model"] = {"name": values["model"], "processor": {"do_image_splitting": False}}
    run(values)
    _, processor = load_adapted(values["output"])
    assert processor.image_processor.do_image_splitting is False
    values["model"]["processor"] = {"do_image_spliting": False}
    with pytest.raises(StageError, match=r"does not take \['do_image_spliting'\].*do_image_splitting"):
        train(load_recipe(values | {"output": f"{values['output']}-other"}))


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
@pytest.mark.parametrize(
    "settings", [{"max_pixels": 56 * 56}, {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}], ids=str
)
def test_limits_of_pixels(settings: dict[str, Any], make: Make) -> None:
    values = make("qwen2_5_vl")
    values["model"] = {"name": values["model"], "processor": settings}
    run(values)
    _, processor = load_adapted(values["output"])
    assert processor.image_processor(Image.new("RGB", (400, 400)), return_tensors="pt")["image_grid_thw"].prod() <= 16


def test_scores_while_it_trains(make: Make) -> None:
    values = make("llava")
    source = {**values["data"][0], "metrics": ["exact_match"]}
    values["evaluation"] = {"data": [source], "steps": 2, "max_new_tokens": 2}
    record = train(load_recipe(values))
    assert [score["step"] for score in record["stages"][-1]["scores"]] == [2, 4]


def test_answers_are_those_of_each_row_alone(make: Make, data: Path) -> None:
    from peft_crome.data import read_rows

    values = make("llava", learning_rate=0.1)
    run(values)
    model, processor = load_adapted(values["output"])
    rows = list(read_rows(data / "image.json", data))
    seen: list[bool] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    together = generate_answers(model, processor, rows, batch_size=8, max_new_tokens=4, progress=False)
    alone = [generate_answers(model, processor, [row], max_new_tokens=4, progress=False)[0] for row in rows]
    assert together == alone
    assert all(seen)
    assert seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ["multi_modal_projector"]}, "leaves the adapter out"),
        ({"stage": "pretrain"}, "write stage: finetune"),
        ({"previous": "somewhere"}, "give one of `model`"),
        ({"images_after_text": True}, "the chat template of `model` decides where images stand"),
        ({"chat_template": "plain"}, "chat_template: 'plain' is for joined models. Leave it out, or write words"),
        ({"model": "nowhere/at-all"}, "is not a folder with a model, and the Hub does not give it"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_recipes(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ValueError, match=message):
        train(load_recipe(make("llava") | changes))


def test_a_model_without_a_chat_template(make: Make) -> None:
    values = make("florence2")
    del values["chat_template"]
    with pytest.raises(ValueError, match="has no chat template"):
        train(load_recipe(values))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of PaliGemma's processor
def test_a_processor_that_takes_prompt_and_answer_apart(
    make: Make, data: Path, family_checkpoint: Callable[[Any], Path]
) -> None:
    """A model whose processor takes prompt and answer separately is refused, and the method that the error names
    trains its adapter."""
    with pytest.raises(ValueError, match=r"takes the answer apart from the prompt \(suffix=\)"):
        train(load_recipe({**make("paligemma"), "chat_template": "words"}))
    checkpoint = family_checkpoint(FAMILIES["paligemma"])
    processor = tf.AutoProcessor.from_pretrained(checkpoint)
    model = get_peft_model(tf.AutoModelForImageTextToText.from_pretrained(checkpoint), CromeConfig())
    images = [[Image.open(data / f"{number}.png")] for number in (1, 2)]
    batch = processor(
        images=images, text=["<image>What color?"] * 2, suffix=["red", "dark blue"], padding=True, return_tensors="pt"
    )
    learned = [processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert learned == ["red<eos>", "dark blue<eos>"]
    model.train()(**batch).loss.backward()
    assert next(p.grad for name, p in model.named_parameters() if "crome_up" in name).any()
