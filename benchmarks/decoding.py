"""Measure greedy decoding with the text branch folded into the embedding table, unfolded, and with LoRA.

    python -m benchmarks.decoding

Frozen DINOv2-small and SmolLM2-135M, one row with an image, in ratio to the base model. Seconds are those between
tokens, without the prompt's pass. Adapters are random and not zero. CROME folded and unfolded must give equal tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from transformers.generation.streamers import BaseStreamer

from benchmarks.devices import SPEED, Device, results_on
from benchmarks.interleaved import in_turn, machine, markdown, middle, plot_ratios, publish, ratios
from benchmarks.methods import BOTH, CONFIGS, backbone, base_of, batch_of
from peft_crome import CromeConfig

BASE, FOLDED, UNFOLDED = "base model", "CROME, folded", "CROME, not folded"
LORAS = [name for name in CONFIGS if name.startswith("LoRA")]


class Watch(BaseStreamer):
    """Record when each token arrives from `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, and then a token at a time."""
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.tokens.append(int(value))

    def end(self) -> None:
        """Do nothing at the end."""


def with_random_weights(name: str, make: Any) -> Any:
    """Build a model with an adapter that acts."""
    torch.manual_seed(0)
    if name == BASE:
        return make().eval()
    if name in LORAS:
        model = get_peft_model(make(), CONFIGS[name])
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.eval()
    model = get_peft_model(make(), CromeConfig(branches=BOTH, init_weights=False)).eval()
    if name == FOLDED:
        model.merge_adapter()
    return model


def decode(model: Any, batch: dict[str, torch.Tensor], tokens: int, **options: Any) -> tuple[float, list[int]]:
    """Return the median seconds from token to token, and the tokens. On a GPU, `generate` waits for each token.

    Args:
        options: arguments of `generate`.
    """
    watch = Watch()
    with torch.inference_mode():
        model.generate(
            **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=watch,
            **options,
        )  # fmt: skip
    between = [after - before for before, after in zip(watch.times[1:], watch.times[2:], strict=False)]
    return statistics.median(between), watch.tokens


def measure(
    repeats: int,
    tokens: int,
    prompt: int,
    make: Callable[[], Any] = backbone,
    names: Sequence[str] = (BASE, FOLDED, UNFOLDED, *LORAS),
    until: float = math.inf,
    **options: Any,
) -> dict[str, Any]:
    """Measure seconds per token of all ways in turn; one value per way and repeat.

    Args:
        tokens: number of generated tokens.
        prompt: number of tokens in the prompt.
        make: function that builds the frozen host.
        names: names of the ways.
        until: as in `in_turn`.
        options: arguments of `generate`.
    """
    models = {name: with_random_weights(name, make) for name in names}
    batch = batch_of(base_of(models[BASE]), 1, prompt)
    del batch["labels"]
    ways = {name: partial(decode, model, batch, tokens, **options) for name, model in models.items()}
    results = in_turn(ways, repeats, until)
    seconds = {name: [passed for passed, _ in values] for name, values in results.items()}
    record: dict[str, Any] = {"tokens": tokens, "prompt": prompt, "seconds": seconds}
    record["compiled_by_generate"] = [name for name in models if hasattr(base_of(models[name]), "_compiled_call")]
    texts = {name: values[-1][1] for name, values in results.items() if values}
    if FOLDED in texts and UNFOLDED in texts:
        record["folded_says_the_same"] = texts[FOLDED] == texts[UNFOLDED]
    return record


def to_base(record: dict[str, Any]) -> dict[str, list[float]]:
    """Compute each way's ratios to the base model."""
    seconds = record["seconds"]
    return {name: ratios(seconds[name], seconds[BASE]) for name in seconds if name != BASE}


def table(record: dict[str, Any]) -> str:
    """Format a line per way."""
    found = to_base(record)
    rows = [
        [name, middle([1000 * value for value in values], 1), middle(found[name]) if name in found else "1"]
        for name, values in record["seconds"].items()
    ]
    return markdown(["", "a token, ms", "to the base model"], rows)


def main(
    repeats: Annotated[int, typer.Option(help="Number of generations of each way.")] = 15,
    tokens: Annotated[int, typer.Option(help="Number of generated tokens.")] = 48,
    prompt: Annotated[int, typer.Option(help="Number of tokens in the prompt.")] = 64,
    device: Device = "cpu",
) -> None:
    """Measure, write and print. Numbers are medians with the middle half."""
    results = results_on(device, SPEED)
    record = {**measure(repeats, tokens, prompt, partial(backbone, device=device)), "machine": machine(device)}
    publish(results / "decoding", record, table(record))
    plot_ratios({"greedy decoding": to_base(record)}, results / "decoding.png", "time of a token / base model")
    print(f"CROME folded and not folded say the same {tokens} tokens: {record['folded_says_the_same']}")


if __name__ == "__main__":
    typer.run(main)
