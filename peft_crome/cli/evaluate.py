"""peft-crome evaluate."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import console, fail


def evaluate(
    directory: Annotated[str, typer.Argument(help="A stage's directory, or a Hub repository of one.")],
    data: Annotated[Path, typer.Argument(help="JSON, JSONL or parquet; a row's last answer is the expected one.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows alone.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    system: Annotated[str | None, typer.Option(help="A system message; by default the one of training.")] = None,
    device: Annotated[str | None, typer.Option(help="By default the accelerator, where there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the answers, JSONL.")] = None,
) -> None:
    """Answer a data set by free generation and report exact matches."""
    from ..data import check_images, read_rows
    from ..training import evaluation

    try:
        if output is not None and not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output {output}: there is no folder {output.absolute().parent}.")
        rows = list(islice(read_rows(data, images), limit))
        if not rows:
            raise ValueError(f"{data} holds no rows.")
        expected = evaluation.references(rows)
        check_images(rows)
        model, processor = _load(directory, device)
        system = system if system is not None else _system_of(directory)
        answers = evaluation.generate_answers(
            model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, system=system
        )
    except (ValueError, OSError) as error:
        fail(error)
    score = evaluation.exact_match(answers, expected)
    console.print(f"exact match: {score['accuracy']:.1%} ± {score['stderr']:.1%} of {score['n']:,} rows")
    if output is not None:
        lines = [
            json.dumps({"id": row["id"], "answer": said, "expected": wanted}, ensure_ascii=False)
            for row, said, wanted in zip(rows, answers, expected, strict=True)
        ]
        temporary = output.with_name(f"{output.name}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(output)


def _load(directory: str, device: str | None) -> tuple[Any, Any]:
    import torch

    from ..training.checkpoint import RECORD, read_record
    from ..vlm import CromeVLMForConditionalGeneration, CromeVLMProcessor

    if (Path(directory) / RECORD).is_file():
        read_record(directory)
    there = torch.accelerator.is_available()
    if device is not None and torch.device(device).type != "cpu" and not there:
        raise ValueError(f"--device {device}: this PyTorch sees no accelerator. Leave the option out.")
    place = device or (str(torch.accelerator.current_accelerator()) if there else None)
    try:
        model = CromeVLMForConditionalGeneration.from_pretrained(directory, device_map=place)
        return model, CromeVLMProcessor.from_pretrained(directory)
    except OSError as error:
        if Path(directory).exists():
            raise
        raise OSError(f"{directory} is no folder, and cannot be had from the Hub: {error}") from error


def _system_of(directory: str) -> str | None:
    """The system message that a stage was trained with."""
    from transformers.utils import cached_file

    from ..training.checkpoint import RECORD

    path = cached_file(directory, RECORD, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8"))["stages"][-1]["recipe"]["system"] if path else None
