"""TRL's preference and reinforcement trainers take CROME where they take LoRA; SFT is examples/train_with_trl.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_crome import CromeConfig
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.vlm.test_qformer import qformer_processor, with_qformer

pytestmark = pytest.mark.slow
COMMON = {"bf16": False, "save_strategy": "no", "report_to": "none", "use_cpu": True, "logging_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llava")
    save_tokenizer_and_model(path)
    return path


@pytest.fixture
def model(folder: Path) -> PeftModel:
    torch.manual_seed(0)
    host = AutoModelForImageTextToText.from_pretrained(folder)
    host.lm_head.weight.data.mul_(30)  # random weights would say every word alike, whatever the embeddings
    return get_peft_model(host, CromeConfig(bottleneck_dim=8))


def turn(role: str, text: str, picture: bool = False) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"}] if picture else []
    return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]


def pictures(rows: int) -> list[list[Image.Image]]:
    return [[Image.new("RGB", (28, 28), ("red", "blue")[row % 2])] for row in range(rows)]


def assert_only_the_adapter_moved(model: PeftModel, before: dict[str, torch.Tensor]) -> None:
    after = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all(".crome." in name and ".default." in name for name in moved), moved


def test_dpo_learns_a_preference_with_the_frozen_model_as_reference(
    model: PeftModel, folder: Path, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_dict(
        {
            "images": pictures(8),
            "prompt": [turn("user", "what color is the shape?", picture=True) for _ in range(8)],
            "chosen": [turn("assistant", "red") for _ in range(8)],
            "rejected": [turn("assistant", "blue") for _ in range(8)],
        }
    )
    before = copy.deepcopy(model.state_dict())
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=0.01, max_length=None,
        beta=1.0, activation_checkpointing=False, **COMMON,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=AutoProcessor.from_pretrained(folder)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # a fresh adapter is its reference
    assert losses[-1] < 0.6, losses
    assert_only_the_adapter_moved(model, before)


def test_grpo_samples_with_the_adapter_and_raises_the_reward(model: PeftModel, folder: Path, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    processor = AutoProcessor.from_pretrained(folder)

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    rows = Dataset.from_dict(
        {"images": pictures(8), "prompt": [turn("user", "what color is the shape?", picture=True) for _ in range(8)]}
    )
    before = copy.deepcopy(model.state_dict())
    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=25, per_device_train_batch_size=16, num_generations=8, learning_rate=0.03,
        max_completion_length=6, activation_checkpointing=False, **COMMON,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=arguments, train_dataset=rows, reward_funcs=reward, processing_class=processor
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.1, rewards
    assert_only_the_adapter_moved(model, before)


def test_sft_collator_does_not_show_a_qformer_the_answers() -> None:
    """Of a conversation with its answers it reads the user's words alone."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    composite = with_qformer()
    composite.config.image_token_id = 95  # the first id that the tokenizer's words leave
    messages = turn("user", "w1 w2", picture=True) + turn("assistant", "w9 w8")
    batch = DataCollatorForVisionLanguageModeling(qformer_processor(composite))(
        [{"images": pictures(1)[0], "messages": messages}]
    )
    assert batch["qformer_input_ids"].tolist() == [[6, 7]]  # w1 w2
    assert 14 in batch["input_ids"]  # w9
    assert composite(**batch).loss.isfinite()
