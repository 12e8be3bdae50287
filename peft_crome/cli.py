"""peft-crome: a command per task. Imported by nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

EXTRA = 'pip install "peft-crome[train]"'

try:
    import typer
    from rich.console import Console
    from rich.table import Table

    from .training import recipe as recipes
    from .training.stages import STAGES
except ImportError as error:  # typer, rich, pydantic: none is needed by the method itself
    sys.exit(f"peft-crome needs {error.name!r}, which is not installed. Write: {EXTRA}")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A key of the recipe and its value: --set training.max_steps=100.")
]


@app.callback()
def main() -> None:
    """CROME: train, evaluate and describe adapters of vision-language models."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a preset: pretrain, instruct, finetune.")],
    settings: Settings = None,
) -> None:
    """Train one stage. Started again, it continues from its last checkpoint."""
    from .training.checkpoint import StageError
    from .training.run import train as run

    try:
        parsed = recipes.load_recipe(recipe, recipes.parse_overrides(settings or []))
        record = run(parsed, lambda trained, rows: _announce(parsed.stage, trained, rows))
    except (recipes.RecipeError, StageError, OSError, ValueError) as error:
        _fail(error)
    last = record["stages"][-1]
    console.print(f"{last['steps']} steps in {last['seconds']:.0f} s")
    if last["losses"]:
        console.print(
            f"loss: {last['losses'][0][1]:.4f} at step {last['losses'][0][0]}, {last['losses'][-1][1]:.4f} last"
        )
    console.print(
        f"{parsed.output} holds all that is needed beside the backbones; its README.md shows how to load it."
    )


@app.command()
def preset(name: Annotated[str, typer.Argument(help="pretrain, instruct or finetune.")]) -> None:
    """Print the paper's recipe for a stage, to be completed."""
    if name not in recipes.PRESETS:
        _fail(ValueError(f"No preset {name!r}; expected one of {list(recipes.PRESETS)}."))
    print(recipes.preset_text(name), end="")


@app.command()
def evaluate(
    directory: Annotated[str, typer.Argument(help="A stage's directory, or a Hub repository of one.")],
    data: Annotated[Path, typer.Argument(help="LLaVA format; each row's last turn is the answer that is expected.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows alone.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    system: Annotated[str | None, typer.Option(help="A system message; by default the one of training.")] = None,
    device: Annotated[str | None, typer.Option(help="By default the accelerator, where there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the answers, JSONL.")] = None,
) -> None:
    """Answer a data set by free generation and report exact matches."""
    from itertools import islice

    import torch

    from .data import check_images, read_llava
    from .training import evaluation
    from .vlm import CromeVLMForConditionalGeneration, CromeVLMProcessor

    try:
        rows = list(islice(read_llava(data, images), limit))
        expected = evaluation.references(rows)
        check_images(rows)
        place = device or (str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None)
        model = CromeVLMForConditionalGeneration.from_pretrained(directory, device_map=place)
        system = system if system is not None else _system_of(directory)
        processor = CromeVLMProcessor.from_pretrained(directory)
        answers = evaluation.generate_answers(
            model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, system=system
        )
    except (ValueError, OSError) as error:
        _fail(error)
    if output is not None:
        lines = [
            json.dumps({"id": row["id"], "answer": said, "expected": wanted}, ensure_ascii=False)
            for row, said, wanted in zip(rows, answers, expected, strict=True)
        ]
        temporary = output.with_name(f"{output.name}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(output)
    score = evaluation.exact_match(answers, expected)
    console.print(f"exact match: {score['accuracy']:.1%} ± {score['stderr']:.1%} of {score['n']:,} rows")


def _system_of(directory: str) -> str | None:
    """The system message that a stage was trained with."""
    from transformers.utils import cached_file

    from .training.checkpoint import RECORD

    path = cached_file(directory, RECORD, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8"))["stages"][-1]["recipe"]["system"] if path else None


def _announce(stage: str, trained: dict[str, int], rows: int) -> None:
    headline = f"{stage}: what trains, on {rows:,} rows, to {STAGES[stage].purpose}"
    console.print(headline, soft_wrap=True)
    table = Table()
    table.add_column("part")
    table.add_column("weights", justify="right")
    for part, count in trained.items():
        table.add_row(part, f"{count:,}")
    console.print(table)


def _fail(error: Exception) -> None:
    Console(stderr=True).print(f"[red]{type(error).__name__}[/red]", end=" ")
    print(error, file=sys.stderr)
    raise typer.Exit(1)
