"""Measure attaching, saving, loading and swapping an adapter, against LoRA of equal size, and a thousand adapters.

    python -m benchmarks.operations

Frozen DINOv2-small and SmolLM2-135M; 737,280 weights of CROME, 748,800 of LoRA. Needs Linux.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as hotswap_lora

from benchmarks.devices import SPEED, Device, clock_on, held, results_on, settle
from benchmarks.interleaved import machine, markdown, middle, publish, ratios, seconds_in_turn
from benchmarks.methods import BOTH, LANGUAGE, backbone
from peft_crome import CromeConfig, hotswap_adapter

CONFIGS: dict[str, PeftConfig] = {
    "CROME": CromeConfig(branches=BOTH, init_weights=False),
    "LoRA": LoraConfig(r=13, target_modules=f"{LANGUAGE}(q_proj|v_proj)", init_lora_weights=False),
}
OPERATIONS = ("attach", "save", "load", "load a second", "hot-swap")


def operations(method: str, folder: Path, make: Any) -> dict[str, Callable[[], object]]:
    """Return each operation on a model of this method, as a function that can be called repeatedly."""
    config = CONFIGS[method]
    bare = make()
    saved = folder / method
    model = get_peft_model(make(), config)
    model.save_pretrained(saved)

    def attach() -> None:
        get_peft_model(bare, config).unload()

    def load() -> None:
        PeftModel.from_pretrained(bare, saved).unload()

    def load_second() -> None:
        model.load_adapter(saved, adapter_name="second")
        model.delete_adapter("second")

    swap = hotswap_adapter if method == "CROME" else hotswap_lora
    return {
        "attach": attach,
        "save": lambda: model.save_pretrained(saved),
        "load": load,
        "load a second": load_second,
        "hot-swap": lambda: swap(model, str(saved), "default"),
    }


def thousand(count: int, make: Any, device: str = "cpu") -> dict[str, int]:
    """Return the bytes that `count` adapters add to the process or to a GPU, and those of their weights."""
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(make(), CONFIGS["CROME"])
        model.save_pretrained(folder)
        own = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "crome_" in name)
        model.load_adapter(folder, adapter_name="first")  # this loads the libraries
        settle(device)
        before = held(device)
        for number in range(count):
            model.load_adapter(folder, adapter_name=f"adapter{number}")
        settle(device)
        return {"adapters": count, "grown": held(device) - before, "weights": own * count}


def table(record: dict[str, Any]) -> str:
    """Format a line per operation."""
    rows = []
    for name in OPERATIONS:
        crome, lora = (record["seconds"][f"{method}, {name}"] for method in CONFIGS)
        cells = [middle([1000 * value for value in values], 0) for values in (crome, lora)]
        rows.append([name, *cells, middle(ratios(crome, lora), 2)])
    return markdown(["", "CROME, ms", "LoRA, ms", "ratio"], rows)


def main(
    repeats: Annotated[int, typer.Option(help="Number of repeats of each operation.")] = 15,
    adapters: Annotated[int, typer.Option(help="Number of adapters on one model, to measure their memory.")] = 1000,
    device: Device = "cpu",
) -> None:
    """Measure, write and print. Numbers are medians with the middle half."""
    results = results_on(device, SPEED)
    make = partial(backbone, device=device)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            f"{method}, {name}": call
            for method in CONFIGS
            for name, call in operations(method, Path(folder), make).items()
        }
        seconds = seconds_in_turn(ways, repeats, clock_on(device))
    record = {"seconds": seconds, "many": thousand(adapters, make, device), "machine": machine(device)}
    publish(results / "operations", record, table(record))
    many = record["many"]
    print(f"{many['adapters']} adapters: {many['grown'] / 1e6:,.0f} MB for {many['weights'] / 1e6:,.0f} MB of weights")


if __name__ == "__main__":
    typer.run(main)
