# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome[train,trl]", "torch", "transformers", "pillow", "typer"]
# ///
"""Train an adapter by reward with TRL's GRPOTrainer: the model answers, and right answers are rewarded.

    python examples/trl_grpo.py --model HuggingFaceTB/SmolVLM-256M-Instruct --data my_data.json --images photos \
        --steps 200 --output crome-grpo

`--data` takes all that `peft_crome.data.read_rows` reads, with images in all rows or in none. The model does not
see the last answer of a row. The reward compares with it, or with the answers of several people if a row has them.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

import peft_crome
import peft_crome.data


def is_right(completions: list[list[dict[str, str]]], answers: list[list[str]], **_: Any) -> list[float]:
    """Return 1 for a completion that equals one of its row's answers up to case, spaces and a final period, else 0."""
    said = [plain(completion[0]["content"]) for completion in completions]
    return [float(one in map(plain, right)) for one, right in zip(said, answers, strict=True)]


def plain(text: str) -> str:
    """Normalize an answer for the comparison."""
    return text.strip().rstrip(".").lower()


def main(
    data: Annotated[Path, typer.Option(help="JSON, JSONL or parquet.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-grpo"),
    steps: int = 200,
    batch_size: Annotated[int, typer.Option(help="Answers a step.")] = 16,
    generations: Annotated[int, typer.Option(help="Answers to one question; divides the batch size.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 32,
    learning_rate: float = 1e-4,
    vllm: Annotated[bool, typer.Option("--vllm", help="Sample with vLLM, which must be installed.")] = False,
) -> None:
    """Train for some steps, save the adapter, print the first and the last mean reward."""
    arguments = GRPOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        num_generations=generations,
        max_completion_length=new_tokens,
        learning_rate=learning_rate,
        use_vllm=vllm,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 20),
        bf16=torch.cuda.is_bf16_supported(),  # TRL's default, True, is an error without a GPU
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype="auto"),
        args=arguments,
        train_dataset=peft_crome.data.to_trl(peft_crome.data.read_rows(data, images)),
        reward_funcs=is_right,
        processing_class=AutoProcessor.from_pretrained(model),
        peft_config=peft_crome.CromeConfig(),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward: first {rewards[0]:.4f}, last {rewards[-1]:.4f}; adapter in {output}")


if __name__ == "__main__":
    typer.run(main)
