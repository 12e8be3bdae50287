"""The command peft-crome export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import console, printing_errors


def export(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Hub names or directories of adapters. NAME=DIRECTORY sets the name for requests."),
    ],
    output: Annotated[Path, typer.Argument(help="Directory to write for vllm serve. It must not exist.")],
    model: Annotated[str | None, typer.Option(help="Model to serve. Default: the one that the adapters name.")] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="The model's revision on the Hub. Without --model, the adapters may name one."),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights of a model on the Hub, instead of naming it.")
    ] = False,
) -> None:
    """Write a directory that vLLM serves: the model, with one adapter or many."""
    from ..serving.export import export as write
    from ..serving.export import load_for_export

    with printing_errors():
        names = adapter_names(adapters)
        network, where, processor = load_for_export(names, model, revision)
        write(network, output, **where, copy=copy or None, processor=processor)
    several = len(names) > 1
    trust = " --trust-request-mm-kwargs" if several else ""
    console.print(f"Serve it: vllm serve {output}{trust}", markup=False, soft_wrap=True)
    if several:
        console.print(f"A request names its adapter, one of {', '.join(names)}.", markup=False, soft_wrap=True)


def adapter_names(adapters: list[str]) -> dict[str, str]:
    """Map names to places. A place without a name gets that of its last part; a single one is "default".

    Raises:
        ValueError: two adapters have one name, or a name has a dot, which names of modules cannot have.
    """
    names: dict[str, str] = {}
    for item in adapters:
        name, equals, place = item.partition("=")
        if not equals or "/" in name or Path(item).exists():  # a path may have the sign, too
            name, place = (Path(item).name if len(adapters) > 1 else "default"), item
        if name in names or "." in name or not name:
            problem = f"{name!r} twice" if name in names else f"the name {name!r}"
            raise ValueError(f"Got {problem}; expected a name of its own, without a dot, for each: NAME={place}.")
        names[name] = place
    return names
