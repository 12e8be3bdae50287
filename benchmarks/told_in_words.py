"""Ask the frozen language model about images described in words: an upper bound for the vision branch on yes/no.

    python -m benchmarks.told_in_words

At best, a branch on image embeddings makes them read like words for what the image shows. So the frozen
SmolLM2-135M-Instruct gets these words ("The image shows a red circle.") without an image, and one of easy-VQA's test
questions. Its answer is the likeliest of the possible ones.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.devices import Device
from examples.easy_vqa import data
from examples.easy_vqa.evaluation import score, score_yes_no
from examples.easy_vqa.parts import smollm2
from examples.easy_vqa.records import write_json

RESULTS = Path(__file__).parent / "results" / "told_in_words.json"
ANSWERS = {"what": (*data.COLORS, *data.SHAPES), "yes/no": ("yes", "no")}


def told(row: dict[str, Any], captions: dict[int, str]) -> dict[str, str]:
    """Build a question about an image that is described in words."""
    return {"role": "user", "content": f"The image shows a {captions[row['image_id']]}.\n{row['question']}"}


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, chat: list[dict[str, str]], answers: tuple[str, ...]) -> str:
    """Return the answer with the highest log-probability, including its end token."""
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    batch = tokenizer(
        [f"{prompt}{said}{tokenizer.eos_token}" for said in answers],
        add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt",
    )  # fmt: skip
    batch = batch.to(model.device)
    logits = model(**batch).logits[:, start - 1 : -1].float().log_softmax(-1)
    targets, mask = batch["input_ids"][:, start:], batch["attention_mask"][:, start:]
    found = (logits.gather(-1, targets[..., None])[..., 0] * mask).sum(-1)
    return answers[int(found.argmax())]


def main(count: int = 200, seed: int = 0, device: Device = "cpu") -> None:
    """Ask `count` test questions of each kind; write the record and print it.

    Args:
        count: number of test questions of each kind.
        seed: seed of the choice of questions.
        device: device of the model.
    """
    chance = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).to(device).eval()
    questions = data.load_questions("test")
    captions = data.captions(questions)
    known = [row for row in questions if row["image_id"] in captions]
    asked, said = [], []
    for kind, answers in ANSWERS.items():
        for row in track(chance.sample([row for row in known if row["kind"] == kind], count), description=kind):
            chat = [{"role": "system", "content": data.SYSTEM}, told(row, captions)]
            asked.append(row)
            said.append(answer(model, tokenizer, chat, answers))
    record = {"score": score(asked, said), "yes_no": score_yes_no(asked, said)}
    write_json(RESULTS, record)
    print({name: f"{found['accuracy']:.1%}" for name, found in (record["score"] | record["yes_no"]).items()})


if __name__ == "__main__":
    typer.run(main)
