"""The command peft-crome doctor."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..utils.shorten import cut, short
from .app import console, print_table, printing_errors
from .options import Column, Images, Prompt, pairs

BAR = 40  # characters of a histogram's longest bar
EXAMPLES = 3


def doctor(
    data: Annotated[Path, typer.Argument(help="A JSON, JSONL or parquet file.")],
    images: Images = None,
    open_images: Annotated[
        bool, typer.Option(help="Decode all images, videos and sounds, or only check that their files exist.")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(help="Count the tokens that this model makes of each row. Name a model, an adapter or a recipe."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens at which training will cut a row. Needs --model.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message for rows that have none.")] = None,
    show: Annotated[
        int,
        typer.Option(
            min=0, help="Print this many rows token by token. Tokens that training learns are green. Needs --model."
        ),
    ] = 0,
    fix: Annotated[
        Path | None, typer.Option(help="Write a copy without the faults to this file. DATA is not changed.")
    ] = None,
    column: Column = None,
    prompt: Prompt = None,
) -> None:
    """Check a data set before training, and name each faulty row. Exits with status 1 if there are any."""
    from ..data import FAULTS, read_rows
    from ..data.doctor import Patient, check_copy, examine, write_fixed

    with printing_errors():
        folders = pairs(images, "--images") if images else None
        columns = pairs(column, "--column") if column else None
        if fix is not None:
            check_copy(data, fix)
        if (show or max_length) and model is None:
            raise ValueError("--show and --max-length need --model, whose tokenizer and template they go by.")
        collator = _collator(model, max_length, system) if model is not None else None
        progress = Progress(
            SpinnerColumn(), TextColumn("{task.fields[rows]:,} rows"), TimeElapsedColumn(), console=console
        )
        with progress:
            task = progress.add_task("rows", rows=0)

            def print_faults(patient: Patient) -> None:
                for fault in patient.faults:
                    progress.console.print(f"row {short(patient.name)}: {fault.message}", markup=False, soft_wrap=True)

            findings = examine(
                data,
                folders,
                columns=columns,
                prompt=prompt,
                open_images=open_images,
                measure=collator.measure if collator is not None else None,
                on_fault=print_faults,
                on_row=lambda rows: progress.update(task, rows=rows),
            )
        _report(findings, FAULTS)
        if fix is not None:
            written, fixed = write_fixed(data, fix, findings, folders)
            console.print(
                f"{fix} holds {written:,} rows, {fixed:,} of them fixed. {data} is unchanged.", soft_wrap=True
            )
        if show and collator is not None:
            for row in islice(read_rows(data, folders, columns=columns, prompt=prompt, faulty="drop"), show):
                _show(row, collator)
    if findings.patients or findings.rows == 0:
        raise typer.Exit(1)


def _collator(model: str, max_length: int | None, system: str | None) -> Any:
    from ..data import ConversationCollator
    from ..training import load_recipe
    from ..training.model.collator import recipe_collator
    from ..training.model.host import read_reader
    from ..training.recipe.file import is_recipe

    if is_recipe(model):
        options = {"training.max_length": max_length, "system": system}
        return recipe_collator(load_recipe(model, {key: value for key, value in options.items() if value is not None}))
    config, processor = read_reader(model)
    limits = ConversationCollator.limits(config)
    return ConversationCollator(processor, max_length=max_length, system=system, ends_answers=True, **limits)


def _show(row: dict[str, Any], collator: Any) -> None:
    """Print one row's tokens: learned ones in green, images, videos and sounds in blue, the others unchanged."""
    from ..data import RowError

    try:
        encoded = collator.encode(row)
    except RowError as error:  # the report has named the error
        console.print(f"row {short(row['id'])} cannot be shown: {error}", markup=False, soft_wrap=True)
        return
    processor = collator.processor
    line = Text(f"row {short(row['id'])}: ", style="bold")
    labels = encoded["labels"] if not collator.is_encoder_decoder else [-100] * len(encoded["input_ids"])
    kinds = {getattr(processor, f"{kind}_token_id", None): kind for kind in ("audio", "video", "image")}
    tokens = zip(encoded["input_ids"], labels, strict=True)
    for kind, run in groupby(tokens, lambda pair: kinds.get(pair[0])):
        if kind is not None:
            line.append(f"[{len(list(run))} {kind} tokens]", style="blue")
            continue
        for token, label in run:
            line.append(processor.tokenizer.decode([token]), style="green" if label != -100 else "")
            line.append("|", style="dim")
    if collator.is_encoder_decoder:
        line.append(" -> ", style="bold")
        for token in encoded["labels"]:
            line.append(processor.tokenizer.decode([token]), style="green")
            line.append("|", style="dim")
    console.print(line, soft_wrap=True)


def _report(findings: Any, names: dict[str, str]) -> None:
    text = f", {findings.text_rows:,} of them text alone" if findings.text_rows else ""
    console.print(f"{findings.rows:,} rows{text}; {len(findings.patients):,} faulty.")
    kinds = findings.by_kind()
    if kinds:
        cells = []
        for kind, name in names.items():
            rows = list(dict.fromkeys(patient for patient, _ in kinds.get(kind, [])))
            if rows:
                fixed = " (read without that part)" if all(fault.fixed for _, fault in kinds[kind]) else ""
                cells.append((name + fixed, f"{len(kinds[kind]):,}", ", ".join(map(cut, rows[:EXAMPLES]))))
        print_table(("what", "rows", "the first"), cells, left=(0, 2))
    if findings.ignored:
        fields = (f"{cut(name)} ({count:,} rows)" for name, count in findings.ignored.most_common())
        console.print(f"fields that are not read: {', '.join(fields)}", markup=False, soft_wrap=True)
    for name, counts in findings.histograms.items():
        _histogram(name, counts)


def _histogram(name: str, counts: Counter[int]) -> None:
    from ..data.doctor import EXACT

    rounded = name not in EXACT
    console.print(f"{name}{', up to' if rounded else ''}")
    most = max(counts.values())
    for value in sorted(counts):
        bar = "█" * max(1, round(BAR * counts[value] / most))
        console.print(f"{value:>10,} {bar} {counts[value]:,}", highlight=False)
