"""The command peft-crome evaluate --text: the loss on plain text, with an adapter and without it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..utils.atomic import new_file
from .app import place, print_table, printing_errors


def evaluate_text(
    directory: str, data: str | None, files: list[Path], batch_size: int, device: str | None, output: Path | None
) -> None:
    """Print the results of `peft_crome.evaluation.text_loss` for each file, and write them to `output` if given."""
    with printing_errors():  # UnicodeDecodeError is a ValueError
        from ..training.model.host import load_adapted

        if data is not None:
            raise ValueError(f"Got the data set {data} and --text; expected one of them. Run the command twice.")
        if output is not None and output.exists():
            raise FileExistsError(f"--output: {output} exists already, and no file is overwritten. Name another one.")
        texts = {str(file): file.read_text(encoding="utf-8") for file in files}
        model, processor = load_adapted(directory, place(device))
        tokenizer = getattr(processor, "tokenizer", processor)
        losses = {name: _measure(model, tokenizer, name, text, batch_size) for name, text in texts.items()}
        if output is not None:
            with new_file(output) as stream:
                stream.write(json.dumps({"directory": directory, "text_loss": losses}, indent=2) + "\n")
    rows = []
    for name, loss in losses.items():
        cells = (f"{loss[key]:.4f} ± {loss[key + '_stderr'] or 0:.4f}" for key in ("adapted", "base", "cost"))
        rows.append((name, *cells, f"{loss['tokens']:,}"))
    headings = ("text", "with the adapter", "without", "cost", "tokens")
    print_table(headings, rows, caption="nats a token, ± standard error over chunks of text")


def _measure(model: Any, tokenizer: Any, name: str, text: str, batch_size: int) -> dict[str, Any]:
    from ..evaluation import text_loss
    from ..evaluation.metrics import plain

    try:
        loss = text_loss(model, tokenizer, text, batch_size=batch_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {key: plain(value) for key, value in asdict(loss).items()}
