"""Test the collator in the trainers of transformers and TRL, and TRL's trainers on rows of `to_trl`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image

import peft_crome
from peft_crome.data import ConversationCollator, to_trl

from . import FAMILIES
from .conversations import encode, turn

STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
PLAIN = {"report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "use_cpu": True}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # TRL's SFTConfig sets it
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_trainers_take_the_collator(kind: str, family_checkpoint: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = family_checkpoint(FAMILIES["llava"])
    Image.new("RGB", (60, 90), "red").save(tmp_path / "red.png")
    question = [{"type": "image"}, {"type": "text", "text": "What color?"}]
    asked, said = {"role": "user", "content": question}, {"type": "text", "text": "red"}
    row = {
        "id": "r",
        "images": [str(tmp_path / "red.png")],
        "messages": [asked, {"role": "assistant", "content": [said]}],
    }
    model = get_peft_model(tf.AutoModelForImageTextToText.from_pretrained(folder), peft_crome.CromeConfig())
    processor = tf.AutoProcessor.from_pretrained(folder)
    arguments: dict[str, Any] = {"output_dir": str(tmp_path), **STEPS, **PLAIN}
    if kind == "transformers":
        trainer_class, settings = tf.Trainer, tf.TrainingArguments(**arguments, label_names=["labels"])
    else:
        trl = pytest.importorskip("trl", reason="TRL is not installed")
        trainer_class = trl.SFTTrainer
        settings = trl.SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = trainer_class(
        model,
        settings,
        train_dataset=Dataset.from_list([row] * 8) if kind == "trl" else [row] * 8,
        data_collator=ConversationCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def conversations(folder: Path, text_alone: bool) -> list[dict[str, Any]]:
    """Return rows with two answers each. With `text_alone`, every second row has no image."""
    Image.new("RGB", (60, 90), "red").save(folder / "red.png")
    image = {"type": "image"}
    rows = []
    for number in range(4):
        shown = [image] if number % 2 == 0 or not text_alone else []
        asked, answered = turn("user", *shown, "What color?"), turn("assistant", "red")
        messages = [asked, answered, turn("user", "Is it a dog?"), turn("assistant", "No")]
        rows.append({"id": str(number), "images": [str(folder / "red.png")] * len(shown), "messages": messages})
    return rows


def length(completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
    """Reward longer answers. Even random weights get this reward."""
    assert answers == [["No"]] * len(completions)
    return [float(len(completion[0]["content"])) for completion in completions]


QUESTIONS = {
    "text": [turn("user", "What is two?")],
    "image": [turn("user", {"type": "image", "image": Image.new("RGB", (60, 90), "red")}, "What color?")],
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SFT": ({"max_length": None}, {}),
    "DPO": ({"max_length": None}, {}),
    "GRPO": ({"num_generations": 2, "max_completion_length": 3}, {"reward_funcs": length}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl"])
def test_trl_takes_rows_of_to_trl(
    name: str, kind: str, family_checkpoint: Callable[[Any], Path], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    folder = family_checkpoint(FAMILIES[name])
    rows = conversations(tmp_path, text_alone=kind != "GRPO")  # GRPO takes one kind of rows
    processor = tf.AutoProcessor.from_pretrained(folder)
    settings, more = KINDS[kind]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=tf.AutoModelForImageTextToText.from_pretrained(folder),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / "adapter"), **{**STEPS, "max_steps": 2}, report_to="none", save_strategy="no",
            use_cpu=True, bf16=False, activation_checkpointing=False, **settings,
        ),
        train_dataset=to_trl({**row, "rejected": "Yes"} if kind == "DPO" else row for row in rows),
        processing_class=processor,
        peft_config=peft_crome.CromeConfig(),
        **more,
    )  # fmt: skip
    if kind == "SFT":
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
        for labels in batch["labels"]:
            learned = processor.tokenizer.decode(labels[labels >= 0])
            assert learned.replace(FAMILIES[name].end_of_turn, "").strip() == "No"
    trainer.train()
    trainer.save_model()
    base = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = {shown: encode(processor, FAMILIES[name], asked) for shown, asked in QUESTIONS.items()}
    with torch.no_grad():
        before = {shown: base(**given).logits for shown, given in inputs.items()}
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(adapted(**inputs["text"]).logits, before["text"])
        assert not torch.equal(adapted(**inputs["image"]).logits, before["image"])
