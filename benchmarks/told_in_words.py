"""Why yes/no questions stay hard for the vision branch alone: the frozen language model, told the image in words.

    python -m benchmarks.told_in_words

The best that a branch on image embeddings could do is to make them read like the words for what is shown. So the
frozen SmolLM2-135M-Instruct gets the words themselves ("The image shows a red circle."), without an image, and one of
easy-VQA's test questions; with some examples before it, or none. An answer is the likelier of the possible ones.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.easy_vqa import data
from examples.easy_vqa.evaluation import score, score_yes_no
from examples.easy_vqa.parts import smollm2
from examples.easy_vqa.training import write_json

RESULTS = Path(__file__).parent / "results" / "told_in_words.json"
EXAMPLES = (0, 4, 16)  # questions of the training split, with their answers, before the one that is asked
ANSWERS = {"what": (*data.COLORS, *data.SHAPES), "yes/no": ("yes", "no")}


def told(row: dict[str, Any], captions: dict[int, str]) -> dict[str, str]:
    """A question about an image that is told in words."""
    return {"role": "user", "content": f"The image shows a {captions[row['image_id']]}.\n{row['question']}"}


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, chat: list[dict[str, str]], answers: tuple[str, ...]) -> str:
    """The answer with the highest log-probability, its end token included."""
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    batch = tokenizer(
        [f"{prompt}{said}{tokenizer.eos_token}" for said in answers],
        add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt",
    )  # fmt: skip
    logits = model(**batch).logits[:, start - 1 : -1].float().log_softmax(-1)
    targets, mask = batch["input_ids"][:, start:], batch["attention_mask"][:, start:]
    found = (logits.gather(-1, targets[..., None])[..., 0] * mask).sum(-1)
    return answers[int(found.argmax())]


def main(count: int = 400, seed: int = 0) -> None:
    """Ask `count` questions of each kind with each number of examples; write the record and print it.

    Args:
        count: test questions of each kind.
        seed: of the questions and the examples.
    """
    chance = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    splits = {split: data.load_questions(split) for split in ("train", "test")}
    captions = {split: data.captions(rows) for split, rows in splits.items()}
    known = {split: [row for row in rows if row["image_id"] in captions[split]] for split, rows in splits.items()}
    record = []
    for examples in EXAMPLES:
        asked, said = [], []
        for kind, answers in ANSWERS.items():
            of_kind = {split: [row for row in rows if row["kind"] == kind] for split, rows in known.items()}
            for row in track(chance.sample(of_kind["test"], count), description=f"{kind}, {examples} examples"):
                chat = [{"role": "system", "content": data.SYSTEM}]
                for other in chance.sample(of_kind["train"], examples):
                    chat += [told(other, captions["train"]), {"role": "assistant", "content": other["answer"]}]
                asked.append(row)
                said.append(answer(model, tokenizer, [*chat, told(row, captions["test"])], answers))
        scores = {"score": score(asked, said), "yes_no": score_yes_no(asked, said)}
        record.append({"examples": examples, **scores})
        write_json(RESULTS, record)
    for entry in record:
        groups = {name: f"{found['accuracy']:.1%}" for name, found in (entry["score"] | entry["yes_no"]).items()}
        print(entry["examples"], "examples:", groups)


if __name__ == "__main__":
    typer.run(main)
