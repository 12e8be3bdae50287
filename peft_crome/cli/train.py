"""The commands peft-crome train, finetune and preset."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..training.recipe import file as recipes
from .announce import announce, say
from .app import console, fail, printing_errors
from .options import DATA, SPLIT, Column, Images, Name, Prompt, pairs

# The learning rate is the best in the ablation (docs/ablation.md) for an adapter alone.
FINETUNE: dict[str, Any] = {
    "batch_size": 16,
    "epochs": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
}
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting, as in --set training.max_steps=100. docs/stages.md lists them all. Repeatable.",
    ),
]


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a preset: pretrain, instruct or finetune.")],
    settings: Settings = None,
    accept_changed_data: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data",
            help="Continue an interrupted run although its data or training.max_length have changed.",
        ),
    ] = False,
) -> None:
    """Train from a recipe, which has all settings. Run the same command again to continue an interrupted run."""
    _run(recipe, _overrides(settings), accept_changed_data)


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub name or directory of a vision-language model, or of an adapter or stage to continue from."
        ),
    ],
    data: Annotated[str, typer.Argument(help=DATA)],
    output: Annotated[str, typer.Option(help="Directory to write the adapter to. It must not exist.")],
    images: Images = None,
    column: Column = None,
    prompt: Prompt = None,
    name: Name = None,
    split: Annotated[str, typer.Option(help=SPLIT)] = "train",
    settings: Settings = None,
    print_recipe: Annotated[
        bool,
        typer.Option(
            "--print-recipe", help="Print the settings as a recipe for `peft-crome train`, and train nothing."
        ),
    ] = False,
) -> None:
    """Teach a model a task by an adapter. Run the same command again to continue an interrupted run."""
    import yaml

    overrides = _overrides(settings)
    with printing_errors():
        folders: Any = pairs(images, "--images") if images else None
        columns = pairs(column, "--column") if column else None
    if folders and list(folders) == [""]:
        folders = folders[""]
    source = {"images": folders, "columns": columns, "prompt": prompt, "name": name}
    source |= {"split": split} if split != "train" else {}
    recipe = {
        **start_of(model, overrides),
        "data": [{"path": data, **{key: value for key, value in source.items() if value is not None}}],
        "output": output,
    }
    if not print_recipe:
        return _run(recipe, overrides)
    with printing_errors():
        parsed = recipes.load_recipe(recipe, overrides)
    print(yaml.safe_dump(parsed.model_dump(mode="json", exclude_unset=True), sort_keys=False), end="")


def start_of(model: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe that teaches a task to a model, or continues from an adapter or a stage.

    Args:
        overrides: values of `--set`; a number of steps replaces the epochs.
    """
    from ..training.model.host import has_been_trained

    start: dict[str, Any] = {"previous": model} if has_been_trained(model) else {"model": {"name": model}}
    training = FINETUNE | ({"epochs": None} if "training.max_steps" in overrides else {})
    return {**start, "stage": "finetune", "training": training}


@printing_errors()
def _overrides(settings: list[str] | None) -> dict[str, Any]:
    return recipes.parse_overrides(settings or [])


def _run(recipe: Any, overrides: dict[str, Any], accept_changed_data: bool = False) -> None:
    from ..training.run import train as run

    try:
        with printing_errors():
            parsed = recipes.load_recipe(recipe, overrides)
            record = run(parsed, lambda report: announce(parsed, report), accept_changed_data=accept_changed_data)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from the last checkpoint.", file=sys.stderr)
        raise typer.Exit(130) from None
    last = record["stages"][-1]
    console.print(f"{last['steps']} steps in {last['seconds']:.0f} s{' since the restart' * last['resumed']}")
    losses = last["losses"]
    for step, loss in losses[:1] + losses[1:][-1:]:  # the first and the last, which may be one
        say(f"loss: {loss:.4f} at step {step}")
    say(f"{parsed.output} is written. Its README.md shows how to load it.")
    say(f"To score it: peft-crome evaluate {parsed.output} DATA")


def preset(name: Annotated[str, typer.Argument(help="The stage: pretrain, instruct or finetune.")]) -> None:
    """Print one of the paper's recipes, to complete with your data and output."""
    if name not in recipes.PRESETS:
        fail(ValueError(f"No preset {name!r}; expected one of {list(recipes.PRESETS)}."))
    print(recipes.preset_text(name), end="")
