# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome[trl]", "datasets", "torch", "transformers", "pillow", "typer"]
# ///
"""Train an adapter with TRL: pass CromeConfig() to SFTTrainer where a LoraConfig would be; the rest is TRL's own.

    python examples/train_with_trl.py --model HuggingFaceTB/SmolVLM-256M-Instruct --data easy_vqa/train \
        --steps 200 --output crome-trl

`--data` is a folder with `questions.json`, a list of [question, answer, image id], and `images/<image id>.png`: the
layout of easy-VQA, which `python -m examples.easy_vqa.parts` fetches (186 MB, with two models) and shows; take its
`easy_vqa/data/train`. Rows have the columns `images`, `prompt` and `completion`, for which TRL counts the completion
alone in the loss. Gradient checkpointing is on, as everywhere in TRL.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import peft_crome


def read(data: Path, end: str) -> Dataset:
    """Conversations with one image each; images are opened when a row is read."""
    rows = [
        {
            "images": [str(data / "images" / f"{image_id}.png")],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer + end}],
        }
        for question, answer, image_id in json.loads((data / "questions.json").read_text())
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image(mode="RGB")))


def end_of_answer(processor: Any, stop_ids: int | list[int] | None) -> str:
    """What to add to an answer so that the model learns to stop: nothing, if the chat template does it."""
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    answer = processor.apply_chat_template(turns, tokenize=False).removeprefix(prompt)
    stops = processor.tokenizer.convert_ids_to_tokens([stop_ids] if isinstance(stop_ids, int) else stop_ids or [])
    return "" if any(stop in answer for stop in stops) else processor.tokenizer.eos_token


def main(
    data: Annotated[Path, typer.Option(help="Folder with questions.json and images/<image id>.png.")],
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-trl"),
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
) -> None:
    """Train for some steps, save the adapter, print the first and the last loss."""
    processor = AutoProcessor.from_pretrained(model)
    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    trainer = SFTTrainer(
        model=vlm,
        args=SFTConfig(
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
        ),
        train_dataset=read(data, end_of_answer(processor, vlm.generation_config.eos_token_id)),
        processing_class=processor,
        peft_config=peft_crome.CromeConfig(),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.model.save_pretrained(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}; adapter in {output}")


if __name__ == "__main__":
    typer.run(main)
