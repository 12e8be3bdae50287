"""python -m examples.easy_vqa quickstart | demo | trial | stages | answer-again."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

# Nothing comes from a model hub. Without this, libraries would look for optional files on it and wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device is enough; Trainer would split batches
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT uses the old name

import typer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()  # only for loading weights; training and answering show theirs

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Where results go; a second run continues there.")] = Path(
        "outputs/quickstart"
    ),
) -> None:
    """Train and evaluate in minutes: one seed, 3,200 captions, 4,800 questions."""
    from .quickstart import run

    run(output)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Checkpoints; a second run continues there.")] = Path("outputs/demo"),
    results: Annotated[Path, typer.Option(help="Records, table and images.")] = Path("benchmarks/results/easy_vqa"),
    seeds: Annotated[int, typer.Option(help="Seeds per method.")] = 3,
) -> None:
    """Run the long version in six hours: five methods, three seeds, the full test split, the loss on plain text."""
    from .demo import run

    run(output, results, seeds)


@app.command()
def trial(
    method: Annotated[
        str, typer.Option(help="Method of the long version (crome, crome-both, lora, projection), or crome-wide.")
    ] = "crome",
    rate: Annotated[float, typer.Option(help="Peak learning rate of the questions' stage.")] = 1e-3,
    align_steps: Annotated[int, typer.Option(help="Steps of the captions' stage.")] = 200,
    affirmative: Annotated[int, typer.Option(help="Steps of the questions' stage without negation.")] = 120,
    paired: Annotated[int, typer.Option(help="Steps with negation, in pairs.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    output: Annotated[Path, typer.Option(help="Checkpoints; a second run continues there.")] = Path("outputs/trials"),
    results: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("benchmarks/results/easy_vqa_trials"),
) -> None:
    """Run one method of the long version with other settings, and score it on held-out training images."""
    from .demo import ALIGN, FINETUNE
    from .trial import run

    draws = (("affirmative", affirmative), ("paired", paired), *FINETUNE.draws[2:])
    tune = replace(FINETUNE, learning_rate=rate, draws=draws, steps=sum(steps for _, steps in draws))
    name = f"{method}-{rate:g}-align{align_steps}-{affirmative}-{paired}-seed{seed}.json"
    run(output, results / name, method, seed, replace(ALIGN, steps=align_steps), tune)


@app.command()
def stages(
    output: Annotated[Path, typer.Option(help="Where everything goes; a second run continues there.")] = Path(
        "outputs/three_stages"
    ),
    test_questions: Annotated[int, typer.Option(help="Test questions per stage.")] = 500,
    scale: Annotated[float, typer.Option(help="Share of the steps, for a quick run.")] = 1.0,
) -> None:
    """Run the paper's three stages with a Q-Former by `peft-crome train`, and evaluate before and after each."""
    from .stages import report

    report(output, test_questions, scale)


@app.command()
def answer_again(output: Path) -> None:
    """Answer a few test questions with the saved model (the quick start calls this in a fresh process)."""
    from .quickstart import answer_again as ask

    ask(output)


if __name__ == "__main__":
    app()
