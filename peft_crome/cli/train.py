"""peft-crome train, peft-crome preset."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..training.recipe import file as recipes
from .announce import announce
from .app import console, fail

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A key of the recipe and its value: --set training.max_steps=100.")
]


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a preset: pretrain, instruct, finetune.")],
    settings: Settings = None,
    accept_changed_data: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data",
            help="Go on from checkpoints although the data, or training.max_length, have changed since.",
        ),
    ] = False,
) -> None:
    """Train one stage. Started again, it continues from its last checkpoint."""
    from ..training.run import train as run

    try:
        parsed = recipes.load_recipe(recipe, recipes.parse_overrides(settings or []))
        record = run(parsed, lambda report: announce(parsed, report), accept_changed_data=accept_changed_data)
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from the last checkpoint.", file=sys.stderr)
        raise typer.Exit(130) from None
    last = record["stages"][-1]
    console.print(f"{last['steps']} steps in {last['seconds']:.0f} s")
    if last["losses"]:
        console.print(
            f"loss: {last['losses'][0][1]:.4f} at step {last['losses'][0][0]}, {last['losses'][-1][1]:.4f} last"
        )
    console.print(
        f"{parsed.output} holds all that is needed beside the backbones; its README.md shows how to load it."
    )


def preset(name: Annotated[str, typer.Argument(help="pretrain, instruct or finetune.")]) -> None:
    """Print the paper's recipe for a stage, to be completed."""
    if name not in recipes.PRESETS:
        fail(ValueError(f"No preset {name!r}; expected one of {list(recipes.PRESETS)}."))
    print(recipes.preset_text(name), end="")
