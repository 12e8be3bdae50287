"""Measure the adapter's part of a training step: forward, backward and AdamW of two branches, without the model.

    python -m benchmarks.own_work

A difference of two steps of seconds each, as in `benchmarks.step_time`, is lost in the noise of a shared machine. So
this measures the small part alone, relative to the step of the frozen model alone, in the same turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.devices import SPEED, Device, clock_on, results_on
from benchmarks.interleaved import machine, markdown, middle, publish, ratios, seconds_in_turn
from benchmarks.methods import CROME, FLOOR, attach, backbone, batch_of, training_step
from benchmarks.step_time import CASES, title

INSIDE = 50  # number of steps of the adapter in a turn, since one takes milliseconds


def own_step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that does the adapter's part of a step, and the look-up in the table, which is the model's."""
    composite = model.get_base_model()
    table, fusion = composite.get_input_embeddings(), composite.vision_fusion
    ids = batch["input_ids"]
    ids = ids.masked_fill(ids == composite.config.image_token_id, 0)  # the placeholder has no row in the table
    with torch.no_grad():
        words = table(ids)
    image = torch.randn_like(words[:, : composite.image_seq_length])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    gradients = [torch.randn_like(words), torch.randn_like(image)]

    def step() -> None:
        torch.autograd.backward([table(ids), fusion(image)], gradients)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(case: dict[str, Any], repeats: int, make: Any = backbone, device: str = "cpu") -> dict[str, Any]:
    """Measure the seconds of a step of the frozen model alone, and of the adapter's part of a step."""
    models = {name: attach(make(case["nf4"]), name) for name in (FLOOR, CROME)}
    batch = batch_of(models[FLOOR], case["rows"], case["tokens"])
    own = own_step(models[CROME], batch)

    def several() -> None:
        for _ in range(INSIDE):
            own()

    ways = {FLOOR: training_step(models[FLOOR], batch), CROME: several}
    seconds = seconds_in_turn(ways, repeats, clock_on(device))
    seconds[CROME] = [value / INSIDE for value in seconds[CROME]]
    dtype = str(models[FLOOR].dtype).removeprefix("torch.")
    return {"case": case, "seconds": seconds, "dtype": dtype, "machine": machine(device)}


def table(records: list[dict[str, Any]]) -> str:
    """Format a line per case."""
    rows = []
    for record in records:
        floor, own = (record["seconds"][name] for name in (FLOOR, CROME))
        shares = middle([100 * ratio for ratio in ratios(own, floor)], 2)
        rows.append([title(record), middle(floor, 2), middle([1000 * value for value in own], 1), f"{shares} %"])
    return markdown(["frozen in", "a step of the frozen model alone, s", "the adapter's own work, ms", "share"], rows)


def main(repeats: Annotated[int, typer.Option(help="Number of repeats of each.")] = 9, device: Device = "cpu") -> None:
    """Measure, write and print. Numbers are medians with the middle half."""
    results = results_on(device, SPEED)
    make = partial(backbone, device=device)
    records = [measure(case, repeats, make, device) for case in CASES if not case["compiled"]]
    publish(results / "own_work", records, table(records))


if __name__ == "__main__":
    typer.run(main)
