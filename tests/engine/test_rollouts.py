"""Test that TRL's trainers sample with vLLM from the policy that they train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import get_peft_model

from peft_crome import CromeConfig
from tests.families.conversations import picture

from .hosts import SIZES, build_host, load_host
from .test_composite import joined  # noqa: F401  # a fixture

CLOSE, APART = 1e-4, 0.1  # log-probabilities that are equal to rounding, and those of different policies


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make TRL's engine compute in float32, and undo its changes to the process at the end."""
    import vllm
    from trl.generation import vllm_generation
    from vllm.distributed import cleanup_dist_env_and_memory

    engines = []

    def engine(**settings: Any) -> Any:
        limits = {"image": 1, "video": 0}
        engines.append(vllm.LLM(dtype="float32", enforce_eager=True, limit_mm_per_prompt=limits, **settings))
        return engines[-1]

    monkeypatch.setattr(vllm_generation, "LLM", engine)
    before = dict(os.environ)
    yield
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)


def trainer_of(name: str, model: Any, processor: Any, folder: Path, **arguments: Any) -> Any:
    """Build a trainer of two steps, each about the same two images."""
    import trl

    images = [[picture(*size)["image"]] for size in SIZES]
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is this?"}]}]
    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, num_generations=2, learning_rate=0.5,
        max_completion_length=8, use_vllm=True, bf16=False, use_cpu=True, save_strategy="no", report_to="none",
        **arguments,
    )  # fmt: skip
    return getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=Dataset.from_dict({"images": images, "prompt": [prompt] * 2}),
        processing_class=processor,
        reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids) % 7) for ids in completion_ids],
    )  # fmt: skip


def watch(trainer: Any) -> list[float]:
    """Return a list that gets, for each later answer, the largest difference between log-probabilities of the engine
    and of the trainer."""
    gaps: list[float] = []
    sampled: list[Any] = []
    generate, compute = trainer.vllm_generation.generate, trainer._get_per_token_logps_and_entropies

    def generated(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        sampled.append(result)
        return result

    def computed(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        if sampled:  # the first call after sampling is that of the policy
            _, completions, logs, _ = sampled.pop()
            for row, ids, of_engine in zip(result[0], completions, logs, strict=True):
                gaps.append(float((row[: len(ids)] - torch.tensor([log[0] for log in of_engine])).abs().max()))
        return result

    trainer.vllm_generation.logprobs = 0  # RLOO asks for none
    trainer.vllm_generation.generate, trainer._get_per_token_logps_and_entropies = generated, computed
    return gaps


def sample(trainer: Any) -> None:
    """Answer questions about both images, without sending weights first."""
    trainer._last_loaded_step = trainer.state.global_step
    trainer._generate_and_score_completions([trainer.train_dataset[row] for row in (0, 0, 1, 1)])


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_each_step_samples_from_the_trained_policy(name: str, tmp_path: Path) -> None:
    """Each step samples from the trained policy, although the model has a second adapter, TRL's reference."""
    build_host("llava", tmp_path / "host")
    torch.manual_seed(0)
    model = get_peft_model(load_host(tmp_path / "host"), CromeConfig(bottleneck_dim=8))
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "host")
    trainer = trainer_of(name, model, processor, tmp_path / "run", beta=0.1)
    assert [*model.peft_config] == ["default", "ref"]
    generation, gaps = trainer.vllm_generation, watch(trainer)
    trainer.train()
    assert len(gaps) == 8
    assert max(gaps) < CLOSE
    gaps.clear()
    sample(trainer)  # after the last step, whose weights the engine does not have
    assert min(gaps) > APART
    gaps.clear()
    super(type(generation), generation).sync_weights()  # embeddings of the images stay in the engine's cache
    sample(trainer)
    assert min(gaps) > APART
    gaps.clear()
    generation.sync_weights()
    sample(trainer)
    assert max(gaps) < CLOSE


HOSTS = {"vision": ("llava", "composite", "qwen2_5_vl", "idefics3", "internvl"), "text": ("llava", "composite")}


@pytest.mark.parametrize(("branch", "host"), [(branch, host) for branch in HOSTS for host in HOSTS[branch]])
def test_a_host_samples_with_changed_weights(
    branch: str, host: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Changed weights act once they are sent. The engine reads a host with only a vision branch from its own
    directory. The composite's head is tied to its table."""
    if host == "composite":
        network, processor = request.getfixturevalue("joined")
    else:
        build_host(host, tmp_path / "host")
        network, processor = load_host(tmp_path / "host"), tf.AutoProcessor.from_pretrained(tmp_path / "host")
    torch.manual_seed(0)
    config = CromeConfig(bottleneck_dim=8, branches=sorted({"vision", branch}), init_weights=False)
    model = get_peft_model(network, config)
    trainer = trainer_of("GRPO", model, processor, tmp_path / "run", vllm_max_model_length=4096)
    generation, gaps = trainer.vllm_generation, watch(trainer)
    sample(trainer)
    assert max(gaps) < CLOSE
    gaps.clear()
    for linear in [part for key, part in model.named_parameters() if ".crome." in key]:
        linear.data.normal_(std=0.3)
    sample(trainer)
    assert min(gaps) > APART
    gaps.clear()
    generation.sync_weights()
    sample(trainer)
    assert max(gaps) < CLOSE
