"""The command peft-crome evaluate."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.atomic import new_file
from .app import fail, place, print_table, printing_errors
from .evaluate_text import evaluate_text
from .options import DATA, SPLIT, Column, Device, Images, Name, Prompt, pairs


def evaluate(
    directory: Annotated[str, typer.Argument(help="Hub name or directory of an adapter, a stage or a model.")],
    data: Annotated[str | None, typer.Argument(help=DATA)] = None,
    images: Images = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Score to compute: exact_match (the default), vqa_accuracy, multiple_choice, cider, rouge_l, bleu or "
            "chrf. Repeatable."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many rows, from the first on.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows to answer at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in an answer.")] = 32,
    system: Annotated[
        str | None, typer.Option(help="System message for rows that have none. Default: the one used in training.")
    ] = None,
    device: Device = None,
    column: Column = None,
    prompt: Prompt = None,
    name: Name = None,
    split: Annotated[str, typer.Option(help=SPLIT)] = "validation",
    output: Annotated[
        Path | None, typer.Option(help="Write the answers to this JSONL file, and the scores to NAME.scores.json.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of DATA: measure the loss on this text file, with the adapter and without it. Repeatable."
        ),
    ] = None,
) -> None:
    """Let a model answer a data set and score its answers, or measure its loss on plain text."""
    if text:
        return evaluate_text(directory, data, text, batch_size, device, output)
    if data is None:
        fail(ValueError("DATA is missing. Name a data set, or text files: --text FILE."))
    from ..data import check_files, read_rows
    from ..data.taken import check_rows, shows_more_than_images
    from ..evaluation import answers as evaluation
    from ..evaluation import metrics
    from ..training.directory.stage import RECORD, read_record
    from ..training.model.host import load_adapted, read_reader

    wanted = list(dict.fromkeys(metric or ["exact_match"]))
    with printing_errors():
        if output is not None:
            _check_output(output)
        source: dict[str, Any] = {
            "images": pairs(images, "--images") if images else None,
            "columns": pairs(column, "--column") if column else None,
            "prompt": prompt,
            "name": name,
            "split": split,
        }
        rows = list(islice(read_rows(data, **source), limit))
        if not rows:
            raise ValueError(f"{data} holds no rows.")
        metrics.check_metrics(rows, wanted)
        check_files(rows)
        if shows_more_than_images(rows):  # refuse media that the model does not take before loading it
            check_rows(rows, read_reader(directory)[1])
        if (Path(directory) / RECORD).is_file():
            read_record(directory)  # refuse an incomplete stage
        model, processor = load_adapted(directory, place(device))
        system = system if system is not None else system_of(directory)
        answers = evaluation.generate_answers(
            model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, system=system
        )
        scores = metrics.score(answers, rows, wanted)
    cells = []
    for key, result in scores.items():
        spread = f"{result['stderr']:.1%}" if metrics.plain(result["stderr"]) is not None else ""  # "" for one row
        cells.append((key, f"{result['score']:.1%}", spread, f"{result['n']:,}"))
    print_table(("metric", "score", "± standard error", "rows"), cells)
    if output is not None:
        plain = {
            metric: {key: metrics.plain(value) for key, value in result.items()} for metric, result in scores.items()
        }
        record = {"directory": directory, "data": data, "max_new_tokens": max_new_tokens, "scores": plain}
        with printing_errors():
            with new_file(output) as file:
                for row, answer, expected in zip(rows, answers, metrics.references(rows), strict=True):
                    more: dict[str, Any] = {key: row[key] for key in ("answers", "options") if key in row}
                    line = {"id": row["id"], "answer": answer, "expected": expected, **more}
                    file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
            with new_file(_scores_file(output)) as file:
                file.write(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _scores_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.scores.json")


def _check_output(output: Path) -> None:
    """Refuse an output that could not be written, or that exists, before anything is loaded."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no folder {folder}.")
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a folder. Name a file: --output {output / 'answers.jsonl'}")
    for path in (output, _scores_file(output)):
        if path.exists():
            raise FileExistsError(f"--output: {path} exists already, and no file is overwritten. Name another one.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--output {output}: {folder} is not a folder that you may write to. Name another one.")


def system_of(directory: str) -> str | None:
    """Return the system message that a stage was trained with."""
    from transformers.utils import cached_file

    from ..training.directory.stage import RECORD

    path = cached_file(directory, RECORD, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8"))["stages"][-1]["recipe"]["system"] if path else None
