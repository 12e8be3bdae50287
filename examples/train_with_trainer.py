# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome[train]", "accelerate", "peft", "torch", "transformers", "pillow", "typer"]
# ///
"""Train an adapter with transformers' Trainer: rows and a collator, and nothing special to CROME.

    python examples/train_with_trainer.py --model HuggingFaceTB/SmolVLM-256M-Instruct --data my_data.json \
        --images photos --steps 200 --output crome-trainer

Any image-text-to-text model with a chat template works. `--data` takes all that `peft_crome.data.read_rows` reads:
LLaVA's conversations, chat messages, or a table. Only the answers count in the loss; only the adapter is trained and
saved. `peft-crome finetune` does the same in one line, with checks before the first step and exact restarts.
"""

from pathlib import Path
from typing import Annotated

import typer
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import peft_crome
import peft_crome.data


def main(
    data: Annotated[Path, typer.Option(help="JSON, JSONL or parquet.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-trainer"),
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
) -> None:
    """Train for some steps, save the adapter, print the first and the last loss."""
    processor = AutoProcessor.from_pretrained(model)
    vlm = get_peft_model(AutoModelForImageTextToText.from_pretrained(model, dtype="auto"), peft_crome.CromeConfig())
    vlm.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator reads the columns, not the model
        label_names=["labels"],  # the Trainer does not find them through a PeftModel
    )
    trainer = Trainer(
        vlm,
        arguments,
        train_dataset=list(peft_crome.data.read_rows(data, images)),
        data_collator=peft_crome.data.ConversationCollator(processor, ends_answers=True),
    )
    trainer.train()
    vlm.save_pretrained(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}; adapter in {output}")


if __name__ == "__main__":
    typer.run(main)
