# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome", "accelerate", "peft", "torch", "transformers", "pillow", "typer"]
# ///
"""Train an adapter with transformers' own Trainer: a list of rows, a collator, nothing that is special to CROME.

    python examples/train_with_trainer.py --model HuggingFaceTB/SmolVLM-256M-Instruct --data easy_vqa/train \
        --steps 200 --output crome-trainer

Any image-text-to-text model with a chat template will do. `--data` is a folder with `questions.json`, a list of
[question, answer, image id], and `images/<image id>.png`: the layout of easy-VQA, which
`python -m examples.easy_vqa.parts` fetches (186 MB, with two models) and shows; take its `easy_vqa/data/train`.
Only the answer counts in the loss; only the adapter is trained and saved.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import peft_crome


class AnswerCollator:
    """Rows -> the model's inputs with labels: -100 on all but the answers."""

    def __init__(self, processor: Any, stop_ids: int | list[int] | None) -> None:
        self.processor = processor
        self.end = ""
        ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
        if not any(stop in self.render("", "yes")[1] for stop in processor.tokenizer.convert_ids_to_tokens(ids)):
            self.end = processor.tokenizer.eos_token  # LLaVA-1.5's template never ends an answer: learn to stop

    def conversation(self, question: str, answer: str | None = None, image: Path | None = None) -> list[Any]:
        shown = {"type": "image", "image": Image.open(image).convert("RGB")} if image else {"type": "image"}
        turns = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer + self.end}]})
        return turns

    def render(self, question: str, answer: str) -> tuple[str, str]:
        """The text of the prompt and of the answer, as the chat template writes them."""
        template = self.processor.apply_chat_template
        prompt = template(self.conversation(question), add_generation_prompt=True, tokenize=False)
        return prompt, template(self.conversation(question, answer), tokenize=False).removeprefix(prompt)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [self.conversation(row["question"], row["answer"], row["image"]) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(rows):
            # Padded on the left, a row ends with its answer. Counted as a difference: cut off, it may split otherwise.
            prompt, answer = self.render(row["question"], row["answer"])
            texts = self.processor.tokenizer([prompt, prompt + answer], add_special_tokens=False)["input_ids"]
            answer_tokens = len(texts[1]) - len(texts[0])
            batch["labels"][i, -answer_tokens:] = batch["input_ids"][i, -answer_tokens:]
        return dict(batch)


def main(
    data: Annotated[Path, typer.Option(help="Folder with questions.json and images/<image id>.png.")],
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-trainer"),
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
) -> None:
    """Train for some steps, save the adapter, print the first and the last loss."""
    processor = AutoProcessor.from_pretrained(model)
    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    stop_ids = vlm.generation_config.eos_token_id
    vlm = get_peft_model(vlm, peft_crome.CromeConfig())
    vlm.print_trainable_parameters()
    rows = [
        {"question": question, "answer": answer, "image": data / "images" / f"{image_id}.png"}
        for question, answer, image_id in json.loads((data / "questions.json").read_text())
    ]
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
        remove_unused_columns=False,  # the rows are the collator's, not the model's
        label_names=["labels"],  # the Trainer does not look for them through a PeftModel
    )
    trainer = Trainer(vlm, arguments, train_dataset=rows, data_collator=AnswerCollator(processor, stop_ids))
    trainer.train()
    vlm.save_pretrained(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}; adapter in {output}")


if __name__ == "__main__":
    typer.run(main)
