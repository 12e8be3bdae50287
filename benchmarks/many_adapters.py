"""Measure a batch of 64 rows with 1, 8 and 64 adapters, against one adapter for all rows and against PEFT's LoRA.

    python -m benchmarks.many_adapters

Frozen DINOv2-small and SmolLM2-135M. Each row has an image and its own adapter (`adapter_names`). The work is a pass
over the prompts, and greedy decoding of some tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftConfig, get_peft_model

from benchmarks.devices import SPEED, Device, clock_on, results_on
from benchmarks.interleaved import machine, markdown, middle, plot_ratios, publish, ratios, seconds_in_turn
from benchmarks.methods import BOTH, LANGUAGE, backbone, batch_of
from peft_crome import CromeConfig

BASE = "no adapter"
WORK = ("a pass", "decoding")


def configurations() -> dict[str, PeftConfig]:
    """Configure both methods, with weights that act."""
    return {
        "CROME": CromeConfig(branches=BOTH, init_weights=False),
        "LoRA r=8 on q, v": LoraConfig(
            r=8, target_modules=f"{LANGUAGE}(q_proj|v_proj)", init_lora_weights=False
        ),
    }  # fmt: skip


def measure(
    rows: int,
    counts: list[int],
    repeats: int,
    prompt: int,
    tokens: int,
    make: Callable[[], Any] = backbone,
    device: str = "cpu",
    until: float = math.inf,
    most_loras: int | None = None,
) -> Any:
    """Measure the seconds of each way and kind of work, one value per repeat.

    Args:
        counts: numbers of different adapters in the batch.
        prompt, tokens: number of tokens that each row reads and decodes.
        make: function that builds the frozen host.
        device: device of the host.
        until: as in `in_turn`; both kinds of work share the time.
        most_loras: the largest of `counts` for LoRA, since adding many takes long.
    """
    base = make().eval()
    batch = batch_of(base, rows, prompt)
    del batch["labels"]
    models: dict[str, tuple[Any, dict[str, Any]]] = {BASE: (base, {})}
    for method, config in configurations().items():
        model = get_peft_model(make(), config, adapter_name="0")
        chosen = [count for count in counts if method == "CROME" or count <= (most_loras or count)]
        for number in range(1, max(chosen)):
            model.add_adapter(str(number), config)
        model.eval()
        models[f"{method}, the active one"] = model, {}
        for count in chosen:
            names = [str(row % count) for row in range(rows)]
            models[f"{method}, {count} of adapter_names"] = model, {"adapter_names": names}
    seconds: dict[str, dict[str, list[float]]] = {}
    for number, work in enumerate(WORK):
        ways = {name: _do(work, *model, batch, tokens) for name, model in models.items()}
        now = time.perf_counter()
        seconds[work] = seconds_in_turn(ways, repeats, clock_on(device), now + (until - now) / (len(WORK) - number))
    return {"rows": rows, "prompt": prompt, "tokens": tokens, "seconds": seconds}


def _do(work: str, model: Any, extra: dict[str, Any], batch: dict[str, torch.Tensor], tokens: int) -> Any:
    # The number 1 would be a view of each row's last token, for which PyTorch copies the head's weight on a CPU.
    last = {"logits_to_keep": torch.tensor([-1], device=model.device)}

    def call() -> None:
        with torch.inference_mode():
            if work == "a pass":
                model(**batch, **extra, **last, use_cache=False)
            else:
                options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
                model.generate(**batch, **extra, **last, **options)

    return call


def to_base(record: Any) -> dict[str, dict[str, list[float]]]:
    """Compute work -> way -> ratios to the model without an adapter."""
    return {
        f"{work}, {record['rows']} rows": {
            name: ratios(values, seconds[BASE]) for name, values in seconds.items() if name != BASE
        }
        for work, seconds in record["seconds"].items()
    }


def table(record: Any) -> str:
    """Format a line per way, with both kinds of work."""
    found = list(to_base(record).values())
    rows = []
    for name in record["seconds"][WORK[0]]:
        cells = [middle(record["seconds"][work][name], 2) for work in WORK]
        shares = [middle(each[name]) if name in each else "1" for each in found]
        rows.append([name, cells[0], shares[0], cells[1], shares[1]])
    decoded = f"prompt and {record['tokens']} tokens, s"
    return markdown(["adapters", "a pass, s", "to none", decoded, "to none"], rows)


def main(
    rows: Annotated[int, typer.Option(help="Number of rows in the batch.")] = 64,
    repeats: Annotated[int, typer.Option(help="Number of repeats of each way.")] = 7,
    prompt: Annotated[int, typer.Option(help="Number of prompt tokens in each row.")] = 32,
    tokens: Annotated[int, typer.Option(help="Number of decoded tokens.")] = 8,
    device: Device = "cpu",
) -> None:
    """Measure, write and print. Numbers are medians with the middle half."""
    results = results_on(device, SPEED)
    make = partial(backbone, device=device)
    record = {**measure(rows, [1, 8, 64], repeats, prompt, tokens, make, device), "machine": machine(device)}
    publish(results / "many_adapters", record, table(record))
    plot_ratios(to_base(record), results / "many_adapters.png", "time / model without an adapter")


if __name__ == "__main__":
    typer.run(main)
