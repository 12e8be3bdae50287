# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome[train,trl]", "torch", "transformers", "pillow", "typer"]
# ///
"""Train an adapter on preferred answers with TRL's DPOTrainer. The model without its adapter is the reference.

    python examples/trl_dpo.py --model HuggingFaceTB/SmolVLM-256M-Instruct --data preferences.json --images photos \
        --steps 200 --output crome-dpo

Each row of `--data` has an answer and a worse one, `rejected`: either a conversation that ends with the answer or with
a question and `chosen`, or TRL's `prompt`, `chosen` and `rejected`. For a table such as RLAIF-V, pass to `read_rows`
columns={"question": "question", "answer": "chosen", "rejected": "rejected", "image": "image"}.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

import peft_crome
import peft_crome.data


def main(
    data: Annotated[Path, typer.Option(help="JSON, JSONL or parquet.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-dpo"),
    steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
) -> None:
    """Train for some steps, save the adapter, print the first and the last loss."""
    arguments = DPOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 20),
        bf16=torch.cuda.is_bf16_supported(),  # TRL's default, True, is an error without a GPU
        max_length=None,  # the default, 1024, may cut through an image: SmolVLM's has 1088 tokens
        save_strategy="no",
        report_to="none",
    )
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype="auto"),
        args=arguments,
        train_dataset=peft_crome.data.to_trl(peft_crome.data.read_rows(data, images)),
        processing_class=AutoProcessor.from_pretrained(model),
        peft_config=peft_crome.CromeConfig(),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}; adapter in {output}")


if __name__ == "__main__":
    typer.run(main)
