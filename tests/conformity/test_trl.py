"""Test that TRL's trainers take CROME where they take LoRA, on a LLaVA and on the composite.

The trainers on a LLaVA with rows from `to_trl` are in examples/trl_*.py, which tests/examples runs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2QFormerConfig, CLIPImageProcessor, Trainer

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.tuner.test_compiled_host import compiled
from tests.vlm.test_qformer import QFORMER, qformer_processor, with_qformer
from tests.vlm.tiny import CHAT_TEMPLATE, build, make_tokenizer

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


def turn(role: str, text: str, image: bool = False) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"}] if image else []
    return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]


def images(rows: int) -> list[list[Image.Image]]:
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
            "images": images(8),
            "prompt": [turn("user", "what color is the shape?", image=True) for _ in range(8)],
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
        {"images": images(8), "prompt": [turn("user", "what color is the shape?", image=True) for _ in range(8)]}
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
    """TRL's collator gives a Q-Former only the user's words of a conversation, without the answers."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    composite = with_qformer()
    composite.config.image_token_id = 95  # the first id that the tokenizer's words leave
    messages = turn("user", "w1 w2", image=True) + turn("assistant", "w9 w8")
    batch = DataCollatorForVisionLanguageModeling(qformer_processor(composite))(
        [{"images": images(1)[0], "messages": messages}]
    )
    assert batch["qformer_input_ids"].tolist() == [[6, 7]]  # w1 w2
    assert 14 in batch["input_ids"]  # w9
    assert composite(**batch).loss.isfinite()


# ---- the composite ----

IMAGE = 95  # the first id that the tokenizer's words leave; the table has 100


def composite(kind: str = "plain", language: str = "llama") -> CromeVLMForConditionalGeneration:
    """Build a composite without a Q-Former, with one that reads instructions, or with one that reads only images."""
    if kind == "instructions":
        model = with_qformer(language)
    elif kind == "image alone":
        sizes = {name: size for name, size in QFORMER.items() if name not in ("vocab_size", "max_position_embeddings")}
        model = build(language=language, qformer_config=Blip2QFormerConfig(**sizes), num_query_tokens=4)
    else:
        model = build(language=language)
    model.config.image_token_id = IMAGE
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


def processor_of(model: CromeVLMForConditionalGeneration) -> CromeVLMProcessor:
    if model.qformer is not None and model.qformer.reads_instructions:
        return qformer_processor(model)
    images_processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=30)
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    return CromeVLMProcessor.from_backbones(images_processor, tokenizer, config=model.config)


def rows_of(form: str, count: int = 4) -> Dataset:
    asked = [turn("user", "w1 w2", image=True) for _ in range(count)]
    if form == "messages":
        return Dataset.from_dict(
            {"images": images(count), "messages": [prompt + turn("assistant", "w3 w4") for prompt in asked]}
        )
    columns = {
        "prompt": {},
        "completion": {"completion": [turn("assistant", "w3 w4") for _ in range(count)]},
        "preference": {
            "chosen": [turn("assistant", "w3 w4") for _ in range(count)],
            "rejected": [turn("assistant", "w5") for _ in range(count)],
        },
    }[form]
    return Dataset.from_dict({"images": images(count), "prompt": asked, **columns})


def sft(model: Any, processor: Any, folder: Path, form: str = "messages", **arguments: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, max_length=None,
        activation_checkpointing=False, **COMMON, **arguments,
    )  # fmt: skip
    return SFTTrainer(model=model, args=config, train_dataset=rows_of(form), processing_class=processor)


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def own_loss(trainer: Any, loss_type: str = "nll") -> float:
    """Return the loss of the trainer's first batch, computed from the composite's own logits."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    composite = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    labels = batch.pop("labels")
    assert not (labels == IMAGE).any()
    output = type(composite).forward(composite, **batch, labels=labels)
    if loss_type != "dft":
        return float(output.loss)
    logs = output.logits[:, :-1].log_softmax(dim=-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return float(-(logs * logs.exp())[labels[:, 1:] != -100].mean())


@pytest.mark.parametrize("kind", ["plain", "instructions", "image alone"])
@pytest.mark.parametrize("form", ["messages", "completion"])
@pytest.mark.parametrize("loss_type", ["nll", "dft", "chunked_nll"])
@pytest.mark.filterwarnings("ignore:`loss_type='chunked_nll'` is deprecated:FutureWarning")  # TRL's own, until 2.0
def test_sft_of_a_composite_has_its_own_loss(loss_type: str, form: str, kind: str, tmp_path: Path) -> None:
    host = composite(kind)
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    trainer = sft(model, processor, tmp_path, form, loss_type=loss_type)
    before = copy.deepcopy(model.state_dict())
    expected = own_loss(trainer, loss_type)
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert (losses[-1] > losses[0]) if loss_type == "dft" else (losses[-1] < losses[0])  # unsure words weigh less
    assert_only_the_adapter_moved(model, before)


def test_sft_of_a_compiled_composite_has_its_own_loss(tmp_path: Path) -> None:
    """A compiled composite has the same loss as a plain one, and placeholders are not labels."""
    host = composite()
    processor = processor_of(host)
    plain = sft(get_peft_model(host, CromeConfig(bottleneck_dim=4)), processor, tmp_path)
    expected = own_loss(plain)
    model = get_peft_model(compiled(composite()), CromeConfig(bottleneck_dim=4))
    trainer = sft(model, processor, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert (batch["input_ids"] == IMAGE).any()
    assert not (batch["labels"] == IMAGE).any()
    assert losses_of(trainer)[0] == pytest.approx(expected, abs=1e-5)


def test_sft_counts_no_image_tokens_when_it_accumulates(tmp_path: Path) -> None:
    """Four rows, accumulated one at a time, have the loss of one batch. The number of tokens that divides it excludes
    placeholders."""
    host = composite()
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    trainer = sft(model, processor, tmp_path, gradient_accumulation_steps=4)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    assert losses_of(trainer)[0] == pytest.approx(own_loss(sft(composite(), processor, tmp_path)), abs=1e-5)


@pytest.mark.parametrize("wrapped", ["none", "lora"])
def test_sft_of_a_composite_with_another_method_or_in_full(wrapped: str, tmp_path: Path) -> None:
    host = composite()
    processor = processor_of(host)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])  # another path through PEFT
    trainer = sft(get_peft_model(host, config) if wrapped == "lora" else host, processor, tmp_path)
    expected = own_loss(trainer)
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]


def test_sft_loads_a_composite_by_name(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    host = composite()
    host.save_pretrained(tmp_path / "composite")
    processor_of(host).save_pretrained(tmp_path / "composite")
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, max_length=None,
        activation_checkpointing=False, **COMMON,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=str(tmp_path / "composite"), args=arguments, train_dataset=rows_of("messages"),
        peft_config=CromeConfig(bottleneck_dim=4),
    )  # fmt: skip
    expected = own_loss(sft(host, processor_of(host), tmp_path / "own"))
    assert losses_of(trainer) == [pytest.approx(expected, abs=1e-5)]


def dpo(model: Any, processor: Any, folder: Path, **arguments: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, max_length=None,
        beta=1.0, activation_checkpointing=False, **COMMON, **arguments,
    )  # fmt: skip
    return DPOTrainer(model=model, args=config, train_dataset=rows_of("preference"), processing_class=processor)


@torch.no_grad()
def preference_loss(trainer: Any, adapted: PeftModel) -> float:
    """Return -log sigmoid of what the adapter adds to the chosen answers over the rejected ones, from the composite's
    logits."""
    batch = dict(trainer.data_collator([trainer.train_dataset[row] for row in range(4)]))
    answers = batch.pop("completion_mask")[:, 1:].bool()
    host = adapted.get_base_model()

    def logs() -> torch.Tensor:
        logits = type(host).forward(host, **batch).logits[:, :-1].log_softmax(dim=-1)
        return (logits.gather(-1, batch["input_ids"][:, 1:, None].clamp(max=99))[..., 0] * answers).sum(dim=1)

    with_adapter = logs()
    with adapted.disable_adapter():
        chosen, rejected = (with_adapter - logs()).chunk(2)
    return float(-torch.nn.functional.logsigmoid(chosen - rejected).mean())


@pytest.mark.parametrize("kind", ["plain", "instructions", "image alone"])
def test_dpo_of_a_composite(kind: str, tmp_path: Path) -> None:
    host = composite(kind)
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    before = copy.deepcopy(model.state_dict())
    losses = losses_of(dpo(model, processor, tmp_path))
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)  # a fresh adapter is its reference
    assert losses[-1] < losses[0]
    assert_only_the_adapter_moved(model, before)


@pytest.mark.parametrize("kind", ["plain", "instructions"])
def test_dpo_loss_of_a_composite_is_that_of_its_logits(kind: str, tmp_path: Path) -> None:
    host = composite(kind)
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    trainer = dpo(model, processor, tmp_path)  # whose reference is the adapter as it is now: an identity
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".crome_up.default." in name:
                parameter.normal_(std=0.3)
    expected = preference_loss(trainer, model.eval())
    assert abs(expected - 0.6931) > 1e-3
    assert losses_of(trainer)[0] == pytest.approx(expected, abs=1e-4)


def test_dpo_of_a_whole_composite_has_its_directory_as_reference(tmp_path: Path) -> None:
    composite().save_pretrained(tmp_path / "composite")
    host = CromeVLMForConditionalGeneration.from_pretrained(tmp_path / "composite")
    losses = losses_of(dpo(host, processor_of(host), tmp_path))
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]


def by_rewards(trainer_name: str, model: Any, processor: Any, folder: Path, **arguments: Any) -> Any:
    """Build a TRL trainer that samples its own answers and scores them."""
    import trl

    config = getattr(trl, f"{trainer_name}Config")(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=8, num_generations=4, learning_rate=0.01,
        max_completion_length=4, activation_checkpointing=False, **COMMON, **arguments,
    )  # fmt: skip
    return getattr(trl, f"{trainer_name}Trainer")(
        model=model, args=config, train_dataset=rows_of("prompt"), processing_class=processor,
        reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids)) for ids in completion_ids],
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.1])  # with and without a reference
@pytest.mark.parametrize("kind", ["plain", "image alone"])
def test_grpo_of_a_composite(kind: str, beta: float, tmp_path: Path) -> None:
    host = composite(kind)
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    trainer = by_rewards("GRPO", model, processor, tmp_path, beta=beta)
    before = copy.deepcopy(model.state_dict())
    seen: list[torch.Tensor] = []
    compute = trainer._get_per_token_logps_and_entropies

    def compared(
        model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int, *args: Any, **given: Any
    ):
        found = compute(model, input_ids, attention_mask, keep, *args, **given)
        with torch.no_grad():
            logits = (
                type(host)
                .forward(host, input_ids=input_ids, attention_mask=attention_mask, pixel_values=given["pixel_values"])
                .logits
            )
        logs = logits[:, -keep - 1 : -1].log_softmax(dim=-1).gather(-1, input_ids[:, -keep:, None])[..., 0]
        shown = attention_mask[:, -keep:].bool()
        torch.testing.assert_close(found[0][shown].detach(), logs[shown], rtol=1e-4, atol=1e-4)
        seen.append(found[0])
        return found

    trainer._get_per_token_logps_and_entropies = compared
    trainer.train()
    assert len(seen) >= 2
    assert_only_the_adapter_moved(model, before)


def test_rloo_of_a_composite(tmp_path: Path) -> None:
    host = composite()
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    before = copy.deepcopy(model.state_dict())
    by_rewards("RLOO", model, processor, tmp_path).train()
    assert_only_the_adapter_moved(model, before)


def test_kto_of_a_composite_starts_at_its_reference(tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    host = composite()
    processor = processor_of(host)
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    before = copy.deepcopy(model.state_dict())
    arguments = KTOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01,
        activation_checkpointing=False, **COMMON,
    )  # fmt: skip
    rows = rows_of("completion").add_column("label", [True, False] * 2)
    losses = losses_of(KTOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor))
    assert losses[0] == pytest.approx(0.5, abs=1e-4)  # 1 - sigmoid(0)
    assert losses[-1] < losses[0]
    assert_only_the_adapter_moved(model, before)


@pytest.mark.parametrize("wrap", [lambda host: host, compiled], ids=["plain", "compiled"])
@pytest.mark.parametrize("trainer_name", ["GRPO", "RLOO"])
def test_a_qformer_that_reads_instructions_is_refused_where_trl_drops_them(
    trainer_name: str, wrap: Any, tmp_path: Path
) -> None:
    host = composite("instructions")
    processor = processor_of(host)
    with pytest.raises(ValueError, match=rf"{trainer_name}Trainer does not hand on the instructions"):
        by_rewards(trainer_name, get_peft_model(wrap(host), CromeConfig(bottleneck_dim=4)), processor, tmp_path)


@pytest.mark.parametrize("wrap", [lambda host: host, compiled], ids=["plain", "compiled"])
@pytest.mark.parametrize("language", ["t5", "bart"])
@pytest.mark.parametrize("trainer_name", ["SFT", "DPO", "GRPO"])
def test_an_encoder_decoder_is_refused_before_training(
    trainer_name: str, language: str, wrap: Any, tmp_path: Path
) -> None:
    host = composite(language=language)
    processor = processor_of(host)
    model = get_peft_model(wrap(host), CromeConfig(bottleneck_dim=4))
    make = {"SFT": sft, "DPO": dpo, "GRPO": lambda *args: by_rewards("GRPO", *args)}[trainer_name]
    with pytest.raises(ValueError, match=r"(?s)no decoder that reads prompt and answer.*transformers\.Trainer"):
        make(model, processor, tmp_path)


def test_trainers_that_are_not_trl_s_are_left_alone() -> None:
    host = composite(language="t5")
    collate = lambda rows: rows  # noqa: E731
    trainer = Trainer(model=host, data_collator=collate)
    assert trainer.data_collator is collate
