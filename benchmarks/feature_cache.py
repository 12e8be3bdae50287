"""Measure a training step with and without cached features of the vision tower, on the quick start's parts.

    python -m benchmarks.feature_cache

Frozen DINOv2-small and SmolLM2-135M in bf16; the adapter trains. The rows of easy-VQA have one question per image.
One process takes three steps in turn: one that computes the features, one that computes and writes them (first
epoch), and one that reads them (later epochs). Other work on the machine therefore affects all of them alike.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model

from benchmarks.devices import Device, clock_on, results_on
from benchmarks.interleaved import markdown
from benchmarks.methods import backbone
from examples.easy_vqa import data
from examples.easy_vqa.parts import cache_dir, easy_vqa_dir
from examples.easy_vqa.records import write_json
from peft_crome import CromeConfig, CromeVLMProcessor, cache_features
from peft_crome.data import ConversationCollator

RESULTS = Path(__file__).parent / "results" / "feature_cache"
WAYS = ("computed", "computed and written", "read")


def batches(processor: Any, composite: Any, rows: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Build batches of one question per image."""
    images: dict[int, dict[str, Any]] = {}
    for row in data.load_questions("train"):
        images.setdefault(row["image_id"], row)
    folder = easy_vqa_dir() / "train" / "images"
    collator = ConversationCollator(processor, **ConversationCollator.limits(composite.config))
    chosen = [_row(row, folder) for row in images.values()]
    return [collator(chosen[start : start + rows]) for start in range(0, rows * count, rows)]


def _row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked = [{"type": "image", "text": None}, {"type": "text", "text": row["question"]}]
    said = [{"type": "text", "text": row["answer"]}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"id": str(row["image_id"]), "images": [str(folder / f"{row['image_id']}.png")], "messages": messages}


def measure(rows: int, steps: int, image_size: int, device: str = "cpu") -> dict[str, Any]:
    """Measure the seconds of each way, one value per batch."""
    composite = backbone(dtype=torch.bfloat16, device=device, image_size=image_size)
    processor = CromeVLMProcessor.from_backbones(config=composite.config)
    clock = clock_on(device)
    model = get_peft_model(composite, CromeConfig()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="features-") as name:
        folder = Path(name)
        for number, batch in enumerate(batches(processor, composite, rows, steps + 1)):
            for way in WAYS:
                cache = None if way == "computed" else cache_features(model, folder)
                start = clock()
                model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                passed = clock() - start
                if cache is not None:
                    expected = (rows, 0) if way == "read" else (0, rows)
                    assert (cache.hits, cache.misses) == expected, (way, cache.hits, cache.misses)
                    cache.detach()
                if number:  # the first batch is a warm-up
                    seconds[way].append(passed)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / (rows * (steps + 1))
    return {"rows": rows, "image_size": image_size, "bytes_per_image": round(size), "seconds": seconds}


def table(measured: list[dict[str, Any]]) -> str:
    """Format medians, with the range of the middle half."""
    rows = []
    for case in measured:
        base = case["seconds"]["computed"]
        for way in WAYS:
            values = case["seconds"][way]
            low, middle, high = statistics.quantiles(values, n=4)
            ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
            seconds = f"{middle:.3f} ({low:.3f} to {high:.3f})"
            rows.append([case["image_size"], case["rows"], way, seconds, f"{ratio:.2f}"])
    return markdown(["pixels", "rows", "features", "a step, s (middle half)", "to computed"], rows)


def main(
    rows: Annotated[int, typer.Option()] = 16, steps: Annotated[int, typer.Option()] = 15, device: Device = "cpu"
) -> None:
    """Measure, write and print the results."""
    measured = [measure(rows, steps, image_size, device) for image_size in (112, 224)]
    results = results_on(device, RESULTS)
    write_json(results / "seconds.json", [{**m, "torch": torch.__version__} for m in measured])
    (results / "table.md").write_text(table(measured))
    print(table(json.loads((results / "seconds.json").read_text())))


if __name__ == "__main__":
    typer.run(main)
