"""The command peft-crome plan."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ..training.errors import RecipeError
from ..training.quantization import Bits
from ..training.recipe.file import is_recipe, load_recipe, parse_overrides
from .announce import GB, say
from .app import fail, print_table
from .train import Settings, start_of

UNREAD: dict[str, Any] = {"output": "planned", "data": [{"path": "planned"}]}  # a plan reads neither


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A model or an adapter that finetune starts from, a recipe (YAML), or a preset."),
    ] = None,
    settings: Settings = None,
    backbone: Annotated[str | None, typer.Option(help="Language model to join to --vision.")] = None,
    vision: Annotated[str | None, typer.Option(help="Vision tower to join to --backbone.")] = None,
    qformer: Annotated[bool, typer.Option("--qformer", help="Add a new Q-Former of InstructBLIP's size.")] = False,
    stage: Annotated[
        Literal["pretrain", "instruct"],
        typer.Option(help="Stage of a joined model to plan. For `finetune`, name the model first."),
    ] = "pretrain",
    quantization: Annotated[Bits | None, typer.Option(help="Load the language model in 4 or 8 bits.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Dtype of the frozen weights.")
    ] = "bfloat16",
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width of an image in pixels.")] = None,
    gpu: Annotated[
        str,
        typer.Option(help="GPU: h100, a100-80, a100-40, l40s, rtx4090, rtx3090, t4, or a memory size such as 48gb."),
    ] = "h100",
    rows: Annotated[int, typer.Option(min=1, help="Number of rows in an epoch.")] = 100_000,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row with its image. Default: the image's and 128 of text.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice instead of keeping them, which takes less memory and more time.",
        ),
    ] = False,
) -> None:
    """Predict the memory and the time of a run on a GPU, without downloading weights."""
    from ..training.model.host import host_of
    from ..training.planning import costs, devices
    from ..training.planning.memory import NotPredictable
    from ..training.recipe.schema import Host

    options: dict[str, Any] = {
        "vision": vision,
        "quantization": quantization,
        "dtype": dtype,
        "image_size": image_size,
    }
    if qformer:
        options |= {"qformer": {}, "qformer_tokenizer": backbone}
    try:
        device = devices.find_gpu(gpu)
        if recipe is not None:
            if backbone or vision or qformer or quantization or image_size or stage != "pretrain":
                section = "backbones" if is_recipe(recipe) else "model"
                raise RecipeError(f"A recipe names its own model. Change its keys: --set {section}.quantization=4bit.")
            overrides = parse_overrides(settings or [])
            source: Any = recipe if is_recipe(recipe) else start_of(recipe, overrides)
            parsed = load_recipe(source, overrides | UNREAD)
            gradient_checkpointing = gradient_checkpointing or parsed.training.gradient_checkpointing
            length = length or parsed.training.max_length
            model = costs.recipe_skeleton(parsed)
            host = host_of(parsed)
            image = costs.image_tokens(host, parsed.previous) if host is not None else _of_composite(model)
        elif backbone is None:
            raise RecipeError("Name a recipe, a model, or two to join: peft-crome plan --backbone NAME --vision NAME.")
        elif vision is not None:
            values = {"preset": stage, "backbones": {"language": backbone, **options}, **UNREAD}
            model = costs.recipe_skeleton(load_recipe(values))
            image = _of_composite(model)
        elif qformer or image_size or stage != "pretrain":
            raise RecipeError("--qformer, --stage and --image-size are for a tower. Name it: --vision NAME.")
        else:
            model = costs.model_skeleton(backbone, dtype, quantization)
            image = costs.image_tokens(Host(name=backbone))
        tokens = length or image + costs.TEXT_TOKENS
        if tokens <= image:
            raise RecipeError(f"--length {tokens}: an image alone takes {image} tokens. Write more.")
        estimates = list(costs.costs(model, device, tokens, gradient_checkpointing=gradient_checkpointing))
    except (OSError, ValueError, NotPredictable) as error:
        fail(error)
    _parts(estimates[0][1])
    images = f", {image} of them an image's" if image else ""
    say(f"{device.name}: {device.memory / GB:.1f} GB for a step; rows of {tokens} tokens{images}.")
    computed = costs.frozen_dtype(model)
    _batches(estimates, device, computed, rows)
    dtype_name = str(computed).removeprefix("torch.")
    if device.seconds(1, computed) is None:
        say(f"How fast {device.name} computes in {dtype_name} is unknown, so no times are given.")
    else:
        say(
            f"Times are an estimate: they assume {devices.SHARE:.0%} of the data sheet's dense rate in {dtype_name}, "
            "and that reading data keeps up."
        )


def _of_composite(model: Any) -> int:
    """Return the tokens of an image; 0 if they are not known."""
    return model.get_base_model().image_seq_length or 0


def _parts(cost: Any) -> None:
    sizes = cost.weights | {"AdamW's states": cost.optimizer, "gradients": cost.gradients}
    print_table(("part", "GB"), [(part, f"{size / GB:.3f}") for part, size in sizes.items()])


def _batches(estimates: list[tuple[int, Any]], device: Any, dtype: Any, rows: int) -> None:
    cells = []
    for count, cost in estimates:
        seconds = device.seconds(cost.flops, dtype)
        fits = cost.peak <= device.memory
        speed = ("", "")
        if seconds is not None and fits:
            speed = (f"{count / seconds[1]:.1f}", f"{rows * seconds[1] / count / 3600:.1f}")
        memory = (f"{cost.kept / GB:.2f}", f"{cost.peak / GB:.2f}", "yes" if fits else "no")
        cells.append((str(count), *memory, *speed))
    headings = ("rows at a time", "kept, GB", "peak, GB", "fits", "rows/s", f"hours for {rows:,} rows")
    print_table(headings, cells, left=())
