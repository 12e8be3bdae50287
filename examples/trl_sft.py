# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome[train,trl]", "torch", "transformers", "pillow", "typer"]
# ///
"""Train an adapter on conversations with TRL's SFTTrainer: pass CromeConfig() instead of a LoraConfig.

    python examples/trl_sft.py --model HuggingFaceTB/SmolVLM-256M-Instruct --data my_data.json --images photos \
        --steps 200 --output crome-sft

Any image-text-to-text model with a chat template works. `--data` takes all that `peft_crome.data.load_rows` reads:
LLaVA's conversations, chat messages, or a table. All answers of a row are learned. TRL's collator, which takes the
rows of `peft_crome.data.to_trl`, learns only the last answer.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import peft_crome
import peft_crome.data


def main(
    data: Annotated[Path, typer.Option(help="JSON, JSONL or parquet.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-sft"),
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
) -> None:
    """Train for some steps, save the adapter, print the first and the last loss."""
    processor = AutoProcessor.from_pretrained(model)
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=max(1, steps // 20),
        bf16=torch.cuda.is_bf16_supported(),  # TRL's default, True, is an error without a GPU
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator reads all columns
    )
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model, dtype="auto"),
        args=arguments,
        train_dataset=peft_crome.data.load_rows(data, images),
        data_collator=peft_crome.data.ConversationCollator(processor, ends_answers=True),
        processing_class=processor,
        peft_config=peft_crome.CromeConfig(),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}; adapter in {output}")


if __name__ == "__main__":
    typer.run(main)
