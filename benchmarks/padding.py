"""Measure how much of a batch is padding, and a training step on padded, grouped and packed rows.

    python -m benchmarks.padding

Rows have the lengths of LLaVA-1.5's instruction mix: the number of rows of each set is as published (arXiv 2310.03744,
table 7). How many turns and words a row of a set has is our estimate, and the sampled rows have 1.6 KB on average,
the published file 1.5 KB. An image has 576 tokens, and rows are cut at 2,048. The step is of SmolLM2-135M with
DINOv2-small in bfloat16, on the batch of median padding of 101, with these lengths divided by four, in the order that
the collator gives the rows. Times are CPU seconds of one thread, padded and packed in turn.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.devices import SPEED
from benchmarks.interleaved import machine, markdown, middle, ratios, seconds_in_turn
from benchmarks.labeled_logits import composite_of
from benchmarks.methods import CROME, FIRST_WORD, IGNORED, LAST_WORD, attach, base_of, training_step
from benchmarks.pages import rewrite
from examples.easy_vqa.records import write_json
from peft_crome import logits_at_labels, pack_rows
from peft_crome.backbone.packed_rows import best_fit, fullest
from peft_crome.training.planning.padding import padding_of

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.padding -->", "<!-- end of padding -->"
IMAGE, LONGEST, ROWS, PROMPT = 576, 2048, 20_000, 40  # PROMPT: system message, of Vicuna's template
TURN, TOKENS_PER_WORD, BYTES_PER_WORD = 8, 1.3, 5.7
# Name, thousands of rows, fewest and most turns, words of a question, words of an answer.
MIX = (
    ("LLaVA", 158, 1, 4, 14, 66),
    ("ShareGPT", 40, 1, 8, 45, 150),
    ("VQAv2", 83, 3, 9, 8, 1),
    ("GQA", 72, 3, 15, 9, 1),
    ("OKVQA", 9, 1, 2, 17, 1),
    ("OCR-VQA", 80, 4, 6, 8, 4),
    ("A-OKVQA", 66, 1, 2, 40, 1),
    ("TextCaps", 22, 1, 1, 16, 12),
    ("RefCOCO", 48, 1, 10, 15, 10),
    ("VG", 86, 10, 10, 15, 10),
)
DIVISOR = 4  # of lengths in the step


def rows_of_mix(rows: int) -> tuple[list[int], list[int], list[int]]:
    """Draw rows: the tokens of each, how many of them have labels, and its bytes of text."""
    chance = random.Random(0)
    lengths, labels, sizes = [], [], []
    weights = [each[1] for each in MIX]
    for name, _, fewest, most, asked, answered in chance.choices(MIX, weights, k=rows):
        turns = chance.randint(fewest, most)
        words = [
            tuple(max(1, round(mean * chance.lognormvariate(-0.2, 0.6))) for mean in (asked, answered))
            for _ in range(turns)
        ]
        question, answer = (sum(part) for part in zip(*words, strict=True))
        media = 0 if name == "ShareGPT" else IMAGE
        length = round(PROMPT + media + turns * TURN + TOKENS_PER_WORD * (question + answer))
        lengths.append(min(length, LONGEST))
        labels.append(round(TOKENS_PER_WORD * answer))
        sizes.append(round(BYTES_PER_WORD * (question + answer)) + 120 * turns + 60)
    return lengths, labels, sizes


def batch_of_lengths(host: Any, lengths: Sequence[int], labels: Sequence[int]) -> dict[str, torch.Tensor]:
    """Build a padded batch of random words; each row of image length and more shows an image."""
    chance = torch.Generator().manual_seed(0)
    last = min(LAST_WORD, host.config.get_text_config().vocab_size)
    rows, targets = [], []
    images = 0
    for length, labeled in zip(lengths, labels, strict=True):
        ids = torch.randint(FIRST_WORD, last, (length,), generator=chance)
        ids[ids == host.config.image_token_id] = FIRST_WORD
        if length > host.image_seq_length + 8:
            ids[4 : 4 + host.image_seq_length] = host.config.image_token_id
            images += 1
        rows.append(ids)
        targets.append(torch.where(torch.arange(length) >= length - max(1, labeled), ids, IGNORED))
    padded = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=0),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
    }
    pixels = torch.randn(images, 3, *host.config.image_height_width, generator=chance).to(host.dtype)
    return padded | {"pixel_values": pixels}


def measure_padding(rows: int = ROWS) -> list[dict[str, Any]]:
    """Measure the padding of random, grouped and packed batches."""
    lengths, _, sizes = rows_of_mix(rows)
    facts = {"rows": rows, "mean_length": statistics.mean(lengths), "mean_bytes": statistics.mean(sizes)}
    return [
        facts
        | {"batch": batch, "max_length": limit}
        | vars(padding_of(lengths, batch, step=batch, max_length=limit, flash=limit is None))
        for batch in (4, 16)
        for limit in (LONGEST, 2 * LONGEST, None)
    ]


def measure_step(
    repeats: int, rows: int, make: Callable[[str], nn.Module] = composite_of, batches: int = 101
) -> dict[str, Any]:
    """Measure a step with each way, on the batch of median padding.

    Args:
        rows: rows of a batch.
        make: function that builds the frozen composite; tests pass a tiny one.
        batches: number of batches that are drawn from the mix.
    """
    torch.manual_seed(0)
    model = attach(make("SmolLM2-135M"), CROME)
    lengths, labels, _ = rows_of_mix(rows * batches)
    host, limit = base_of(model), LONGEST // DIVISOR
    drawn = [slice(first, first + rows) for first in range(0, rows * batches, rows)]
    chosen = sorted(drawn, key=lambda each: sum(lengths[each]) / max(lengths[each]))[batches // 2]
    sizes, learned = ([count // DIVISOR for count in values[chosen]] for values in (lengths, labels))
    order = [row for together in fullest(sizes, limit, best_fit) for row in together]
    batch = batch_of_lengths(host, [sizes[row] for row in order], [learned[row] for row in order])

    def in_packs(model: nn.Module, batch: Any) -> Any:
        packed = logits_at_labels(model, pack_rows(model, batch, limit))
        return {name: value for name, value in packed.items() if name != "use_cache"}  # `training_step` has it

    asked: dict[str, Callable[[nn.Module, Any], Any]] = {"padded": logits_at_labels, "packed": in_packs}
    ways = {name: training_step(model, batch, ask) for name, ask in asked.items()}
    packed = pack_rows(model, batch, limit)
    return {
        "rows": rows,
        "max_length": limit,
        "tokens": {
            "padded": batch["input_ids"].numel(),
            "packed": packed["input_ids"].numel(),
            "used": int(batch["attention_mask"].sum()),
        },
        "seconds": seconds_in_turn(ways, repeats, time.process_time),
        "machine": machine(),
        "load": os.getloadavg(),
    }


def text(padding: list[dict[str, Any]], step: dict[str, Any]) -> str:
    """Format both measurements as they stand in docs/speed.md."""
    lines = []
    for batch in dict.fromkeys(record["batch"] for record in padding):
        of_batch = {record["max_length"]: record for record in padding if record["batch"] == batch}
        first = of_batch[LONGEST]
        shares = [first["random"], first["grouped"], *(of_batch[limit]["packed"] for limit in (LONGEST, 2 * LONGEST))]
        lines.append([batch, *(f"{share:.0%}" for share in shares), f"{of_batch[None]['packed']:.0%}"])
    header = ["rows of a batch", "random", "`group_by_length`", "`packing`, 2,048 tokens", "`packing`, 4,096 tokens"]
    header.append("`packing`, flash attention")
    seconds, tokens = step["seconds"], step["tokens"]
    taken = []
    for way, values in seconds.items():
        ratio = "1" if way == "padded" else middle(ratios(values, seconds["padded"]), 2)
        share = f"{1 - tokens['used'] / tokens[way]:.0%}"
        taken.append([way, f"{tokens[way]:,}", share, middle(values, 2), ratio])
    return "\n\n".join(
        [
            "The share of a batch's tokens that are padding:",
            markdown(header, lines).strip(),
            f"A training step of {step['rows']} rows, SmolLM2-135M in bfloat16, logits at labels:",
            markdown(["rows", "tokens", "of them padding", "a step, CPU s", "to padded"], taken).strip(),
        ]
    )


def main(
    repeats: Annotated[int, typer.Option(help="Number of steps of each way.")] = 3,
    rows: Annotated[int, typer.Option(help="Rows of a batch in the step.")] = 8,
) -> None:
    """Measure, and write the results and their part of docs/speed.md."""
    torch.set_num_threads(1)
    records = {"padding": measure_padding(), "step": measure_step(repeats, rows)}
    write_json(SPEED / "padding.json", records)
    rewrite(PAGE, BEGIN, END, text(**records))
    print(text(**records))


if __name__ == "__main__":
    typer.run(main)
