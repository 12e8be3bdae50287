"""The collator in transformers' Trainer and in TRL's, on a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from datasets import Dataset
from peft import get_peft_model
from PIL import Image

import peft_crome
from peft_crome.data import ConversationCollator

from . import FAMILIES

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
