"""Turn easy-VQA into conversations: captions derived from training answers, questions, and blind baselines."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from .parts import easy_vqa_dir

COLORS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("what", "yes/no")
YES_NO_GROUPS = ("is there, shown", "is there, not shown", "is there not, shown", "is there not, not shown")
# The records of results were made with these words. That of examples.second_task alone had "images" in them.
SYSTEM = "You answer questions about pictures."
CAPTION_REQUEST = "Describe the picture."


def load_questions(split: str) -> list[dict[str, Any]]:
    """Load the official questions of "train" or "test": question, answer, image_id, kind ("what" or "yes/no")."""
    rows = json.loads((easy_vqa_dir() / split / "questions.json").read_text())
    return [{"question": q, "answer": a, "image_id": i, "kind": kind_of(a)} for q, a, i in rows]


def kind_of(answer: str) -> str:
    """Return the kind, one of `KINDS`, of a question with this answer."""
    return "yes/no" if answer in ("yes", "no") else "what"


def yes_no_group(row: dict[str, Any]) -> str | None:
    """Return whether a yes/no question is negated and whether the image shows its object; None for other questions."""
    if row["kind"] != "yes/no":
        return None
    negated = re.search(r"\b(not|no)\b", row["question"]) is not None
    shown = (row["answer"] == "yes") != negated
    return f"is there{' not' if negated else ''}, {'shown' if shown else 'not shown'}"


def captions(questions: list[dict[str, Any]]) -> dict[int, str]:
    """Map image_id to "red circle" if the answers to the training questions determine both color and shape."""
    known: dict[int, dict[str, str]] = defaultdict(dict)
    for row in questions:
        for part, words in (("color", COLORS), ("shape", SHAPES)):
            if row["answer"] in words:
                known[row["image_id"]][part] = row["answer"]
    return {i: f"{parts['color']} {parts['shape']}" for i, parts in known.items() if len(parts) == 2}


def blind_baselines(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Answer the test questions without images: name of a baseline -> one answer per row of `test`."""
    answers = Counter(row["answer"] for row in train)
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        by_text[row["question"]][row["answer"]] += 1
    return {
        "most frequent answer": [answers.most_common(1)[0][0] for _ in test],
        "best answer to each question text": [
            (by_text[row["question"]] or answers).most_common(1)[0][0] for row in test
        ],
    }


def sample(test: list[dict[str, Any]], sizes: dict[str, int], seed: int = 0) -> list[dict[str, Any]]:
    """Draw a fixed random sample of the test questions: so many of each kind, or all if there are fewer."""
    generator = random.Random(seed)
    chosen: list[dict[str, Any]] = []
    for kind, size in sizes.items():
        rows = [row for row in test if row["kind"] == kind]
        chosen += rows if size >= len(rows) else generator.sample(rows, size)
    return chosen


def caption_rows(train: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Draw `count` training rows of one captioned image each. Every image comes once before any is repeated."""
    known = captions(train)
    return [{"image_id": i, "turns": [[CAPTION_REQUEST, known[i]]]} for i in _take(list(known), count, seed)]


def question_rows(
    train: list[dict[str, Any]], count: int, seed: int, questions_per_image: int, draw: str = "any"
) -> list[dict[str, Any]]:
    """Draw `count` training rows of one image and some of its questions each.

    Args:
        draw: "any" of an image's questions; or "paired": one "what" question, and yes/no questions in pairs of one
            wording. The image shows the object of the first question in a pair and not that of the second, so the
            wording alone is right half of the time. "affirmative" is the same without negated questions. Images
            without a pair are then left out.
    """
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in train:
        by_image[row["image_id"]].append(row)
    generator = random.Random(seed)
    if draw != "any":
        wordings = ("is there",) if draw == "affirmative" else ("is there", "is there not")
        by_image = {i: pool for i, pool in by_image.items() if _pairs(pool, wordings, random.Random(0))}
    rows = []
    for i in _take(list(by_image), count, seed):
        turns = by_image[i]
        if draw == "any":
            turns = generator.sample(turns, min(questions_per_image, len(turns)))
        else:
            pairs = _pairs(turns, wordings, generator)
            what = [row for row in turns if row["kind"] == "what"]
            turns = [row for pair in pairs for row in pair][:questions_per_image]
            turns += generator.sample(what, min(1, len(what)))
            generator.shuffle(turns)
        rows.append({"image_id": i, "turns": [[row["question"], row["answer"]] for row in turns]})
    return rows


def _pairs(
    rows: list[dict[str, Any]], wordings: tuple[str, ...], generator: random.Random
) -> list[list[dict[str, Any]]]:
    """Return up to two pairs per wording: a question about what the image shows, and one about what it does not."""
    pairs = []
    for wording in wordings:
        shown = [row for row in rows if yes_no_group(row) == f"{wording}, shown"]
        absent = [row for row in rows if yes_no_group(row) == f"{wording}, not shown"]
        generator.shuffle(shown)
        generator.shuffle(absent)
        pairs += [[yes, no] for yes, no in list(zip(shown, absent, strict=False))[:2]]
    return pairs


def messages(turns: Iterable[Iterable[str]]) -> list[dict[str, Any]]:
    """Build chat messages of question and answer turns about one image. A last turn without an answer asks for one."""
    chat: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for number, (question, *answer) in enumerate(turns):
        image = [{"type": "image"}] if number == 0 else []
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        chat += [{"role": "assistant", "content": text} for text in answer]
    return chat


def tokenized(rows: list[dict[str, Any]], processor: Any, isolated: bool = False) -> Dataset:
    """Tokenize rows to input_ids and labels. Only answers and their end tokens count in the loss (-100 elsewhere).

    Args:
        isolated: each question follows the image as if it were the first, and `Collator` hides questions from one
            another. Otherwise a row is one conversation, in which earlier answers may reveal a later one without
            the image.
    """
    encode = _tokenize_isolated if isolated else _tokenize
    return Dataset.from_list([{"image_id": row["image_id"], **encode(row["turns"], processor)} for row in rows])


def _tokenize_isolated(turns: list[list[str]], processor: Any) -> dict[str, list[int]]:
    """Tokenize the part up to the image, and each turn after it. `turn` numbers the turns; -1 is the first part."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "turn": []}
    for number, turn in enumerate(turns):
        one = _tokenize([turn], processor)
        length = len(one["input_ids"])
        shared = length - one["input_ids"][::-1].index(processor.image_token_id)  # up to the last image token
        start = 0 if number == 0 else shared
        row["input_ids"] += one["input_ids"][start:]
        row["labels"] += one["labels"][start:]
        row["position_ids"] += range(start, length)
        row["turn"] += [-1] * (shared - start) + [number] * (length - shared)
    return row


def _tokenize(turns: list[list[str]], processor: Any) -> dict[str, list[int]]:
    chat = messages(turns)
    text = _render(chat, processor)
    spans = []
    for end, message in enumerate(chat):
        if message["role"] == "assistant":
            start = len(_render(chat[:end], processor, add_generation_prompt=True))
            stop = len(_render(chat[: end + 1], processor).rstrip())
            spans.append((start, stop))
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= first and last <= stop for start, stop in spans) else -100
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def _render(chat: list[dict[str, Any]], processor: Any, add_generation_prompt: bool = False) -> str:
    text = processor.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False)
    return text.replace(processor.image_token, processor.image_token * processor.image_seq_length)


def tokens_before_the_image(rows: Dataset, image_token_id: int) -> torch.Tensor:
    """Return the tokens, (tokens,), before the image of every row. There are none if the rows begin differently."""
    first = list(rows[0]["input_ids"])
    start = first[: first.index(image_token_id)]
    same = all(list(row[: len(start)]) == start for row in rows["input_ids"])
    return torch.tensor(start if same else [], dtype=torch.long)


class Collator:
    """Pad rows on the right, add each image's features, and request logits only where an answer is predicted.

    The language model's head is a third of a step's work, and most tokens of a row are not answers. `logits_to_keep`
    lists the columns before those in which any row has a label; `labels` has only these columns, already shifted.

    Args:
        features: (images, tokens, vision_width), by image_id; output of the frozen tower.
        pad_token_id: padding of input_ids; the mask is made by length, since the id may also end a turn.

    Attributes:
        cached: number of a row's first tokens that are left out, since a cache has their keys and values.
    """

    def __init__(self, features: torch.Tensor, pad_token_id: int) -> None:
        self.features = features
        self.pad_token_id = pad_token_id
        self.cached = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.pad(rows, self.pad_token_id)
        if "turn" in rows[0]:
            batch |= self.isolate(rows)
        columns = (batch["labels"][:, 1:] != -100).any(dim=0).nonzero().flatten()
        batch["labels"] = batch["labels"][:, columns + 1]
        batch["logits_to_keep"] = columns - self.cached
        for name in {"input_ids", "position_ids"} & batch.keys():
            batch[name] = batch[name][:, self.cached :]
        if batch["attention_mask"].ndim == 4:  # a row for each token that asks, a column for each that is seen
            batch["attention_mask"] = batch["attention_mask"][:, :, self.cached :]
        batch["vision_features"] = self.features[[row["image_id"] for row in rows]]
        return batch

    @staticmethod
    def isolate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return position_ids, (rows, longest), and a mask, (rows, 1, longest, longest), with which a turn sees the
        prefix and itself."""
        turn = _padded((row["turn"] for row in rows), -2)  # padding attends to padding
        seen = ((turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == -1)).tril()
        lowest = torch.finfo(torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, lowest)
        position_ids = _padded(row["position_ids"] for row in rows)
        return {"position_ids": position_ids, "attention_mask": mask[:, None]}

    @staticmethod
    def pad(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
        """Pad input_ids, attention_mask and labels of the rows to (rows, longest)."""
        return {
            "input_ids": _padded((row["input_ids"] for row in rows), pad_token_id),
            "attention_mask": _padded([1] * len(row["input_ids"]) for row in rows),
            "labels": _padded((row["labels"] for row in rows), -100),
        }


def _padded(rows: Iterable[list[int]], padding: int = 0) -> torch.Tensor:
    """Pad rows on the right to (rows, longest)."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=padding)


def _take(items: list[int], count: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)
    taken = 0
    while taken < count:
        order = generator.sample(items, len(items))[: count - taken]
        yield from order
        taken += len(order)
