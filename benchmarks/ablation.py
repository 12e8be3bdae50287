"""Measure the worth of each part of the adapter, and other methods, on easy-VQA at the quick start's budget.

    python -m benchmarks.ablation                # all runs that are not finished
    python -m benchmarks.ablation --processes 2  # two runs at a time, one thread each: a third faster on two cores
    python -m benchmarks.ablation --report       # table and plot of the existing records

Each run has 200 caption steps with the projection and 200 question steps without it (the projection alone keeps
training), on the same images and questions in the same order. A run's result is written when it ends. A second call
continues with the next run, in the same dtype. The first call loads the backbones in the dtype that is fast on the
machine, which the table shows.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console

from benchmarks.devices import Device, is_gpu
from benchmarks.interleaved import machine, markdown, save_plot
from benchmarks.pages import rewrite
from benchmarks.variants import SOFT_TOKENS, VARIANTS, Variant
from examples.easy_vqa import data, quickstart
from examples.easy_vqa.evaluation import answer, score, spread
from examples.easy_vqa.model import PROJECTION, backbone, frozen_dtype, processor, vision_features
from examples.easy_vqa.records import write_json
from examples.easy_vqa.training import Stage, fit

RESULTS = Path(__file__).parent / "results" / "ablation"
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- begin: written by python -m benchmarks.ablation -->", "<!-- end -->"
SAMPLE = {"what": 1000, "yes/no": 500}
console = Console()


def run_one(
    variant: Variant,
    seed: int,
    dtype: torch.dtype,
    align: Stage = quickstart.ALIGN,
    finetune: Stage = quickstart.FINETUNE,
    sample: dict[str, int] = SAMPLE,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run both stages of one variant and seed, with the backbones in `dtype`, and answer the questions."""
    shared = processor()
    if variant.soft_prompt:
        shared = copy.copy(shared)
        soft = "".join(shared.tokenizer.convert_ids_to_tokens(SOFT_TOKENS))
        shared.chat_template = soft + shared.chat_template
    train, test = (vision_features(split, shared.image_processor, dtype) for split in ("train", "test"))
    torch.manual_seed(seed)
    composite = backbone("projection", dtype).to(device)
    model = variant.attach(composite, train[:100].to(device))
    own = [parameter.requires_grad_(True) for parameter in model.parameters() if parameter.requires_grad]
    projection = list(getattr(composite, PROJECTION).parameters())
    for parameter in [*own, *projection]:
        parameter.data = parameter.data.float()  # half precision would lose small steps
        parameter.requires_grad_(True)
    stages = {"align": replace(align, learning_rate=variant.align_rate)}
    stages["finetune"] = replace(finetune, learning_rate=variant.finetune_rate)
    record: dict[str, Any] = {"variant": variant.name, "seed": seed, "main": variant.main}
    record |= {"dtype": str(composite.dtype).removeprefix("torch."), "machine": machine(device)}
    for name, stage in stages.items():
        if name == "finetune" and own:
            for parameter in projection:
                parameter.requires_grad_(False)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        fitted = fit(model, stage, seed, shared, train, None, use_cpu=not is_gpu(device))
        record[name] = {"settings": asdict(stage), "trained_parameters": trained, **fitted}
    start = time.perf_counter()
    questions = data.sample(data.load_questions("test"), sample)
    answers = answer(model, shared, test, questions, description=f"{variant.name}, seed {seed}")
    return {**record, "answering_seconds": round(time.perf_counter() - start, 1), "score": score(questions, answers)}


def plan(seeds: int = 3) -> list[tuple[Variant, int]]:
    """List all runs, ordered so that each seed's main rows come before the next seed's."""
    main = [variant for variant in VARIANTS if variant.main]
    others = [(variant, 0) for variant in VARIANTS if not variant.main]
    return [*[(variant, 0) for variant in main], *others, *[(v, seed) for seed in range(1, seeds) for v in main]]


def file_of(variant: Variant, seed: int, results: Path = RESULTS) -> Path:
    """Return the path of a run's record."""
    words = "".join(letter if letter.isalnum() else " " for letter in variant.name.lower()).split()
    return results / f"{'-'.join(words)}-seed{seed}.json"


def dtype_of_all(results: Path = RESULTS) -> torch.dtype:
    """Return the dtype of the existing records, so that rows compare; without any, this machine's fast dtype.

    Raises:
        ValueError: the records have several dtypes, so their rows do not compare.
    """
    found = sorted({json.loads(file.read_text())["dtype"] for file in results.glob("*-seed*.json")})
    if len(found) > 1:
        raise ValueError(
            f"{results} has records in {' and '.join(found)}, whose rows do not compare. "
            "Move those of one dtype elsewhere, or give --results another folder."
        )
    return getattr(torch, found[0]) if found else frozen_dtype()


def write_report(results: Path = RESULTS) -> None:
    """Write table and plot of the existing records; into the docs as well if the results are the repository's."""
    rows, points, done = [], [], 0
    for variant in VARIANTS:
        files = [file_of(variant, seed, results) for seed in range(100)]
        records = [json.loads(file.read_text()) for file in files if file.is_file()]
        if not records:
            continue
        done += len(records)
        scores = [record["score"] for record in records]
        weights = records[0]["finetune"]["trained_parameters"]
        rates = f"{variant.align_rate:g} / {variant.finetune_rate:g}"
        dtypes = ", ".join(sorted({record["dtype"] for record in records}))
        cells = [variant.name, len(records), *(spread(scores, kind) for kind in data.KINDS)]
        rows.append([*cells, f"{weights:,}", rates, dtypes])
        points.append((variant, weights, [score["what"]["accuracy"] for score in scores]))
    header = ["", "seeds", "what color / shape", "yes/no", "weights in (b)", "rates (a) / (b)", "frozen dtype"]
    table = markdown(header, rows)
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(table)
    _plot(points, results / "accuracy_over_weights.png")
    if results.resolve() == RESULTS.resolve():
        shutil.copy(results / "accuracy_over_weights.png", DOCS / "images" / "ablation.png")
        rewrite(DOCS / "ablation.md", BEGIN, END, f"{done} of {len(plan())} runs are done.\n\n{table}")


def _plot(points: list[tuple[Variant, int, list[float]]], path: Path) -> None:
    """Plot names over accuracy, to separate rows with equal weights, and accuracy over weights."""
    kinds = ["CROME, whole or without a part", "CROME, other settings", "without CROME"]
    figure, (names, weights_axis) = plt.subplots(
        1, 2, figsize=(12, 1.5 + 0.25 * len(points)), width_ratios=[3, 2], layout="constrained"
    )
    for row, (variant, weights, values) in enumerate(points):
        kind = 2 if not variant.name.startswith("CROME") else 0 if variant.main else 1
        middle = statistics.mean(values)
        spread = [[100 * (middle - min(values))], [100 * (max(values) - middle)]]
        style: dict[str, Any] = {"color": f"C{kind}", "capsize": 3, "marker": "os^"[kind], "markersize": 5}
        names.errorbar(100 * middle, row, xerr=spread, **style)
        weights_axis.errorbar(weights, 100 * middle, yerr=spread, alpha=0.7, **style)
    names.set_yticks(range(len(points)), [variant.name for variant, _, _ in points])
    names.invert_yaxis()
    names.set(xlabel='"what" questions right, %', title="by row")
    weights_axis.set(xscale="log", xlabel="weights trained in (b)", ylabel='"what" questions right, %')
    weights_axis.set_title("over the weights")
    handles = [plt.Line2D([], [], color=f"C{i}", marker="os^"[i], ls="", label=kind) for i, kind in enumerate(kinds)]
    figure.legend(handles=handles, loc="outside lower center", ncol=3)
    figure.suptitle("easy-VQA, 200 + 200 steps; mean and range over the seeds")
    for axis in (names, weights_axis):
        axis.grid(alpha=0.3)
    save_plot(figure, path)


def _run_to_file(name: str, seed: int, results: Path, threads: int, dtype: torch.dtype, device: str) -> str:
    """Run in a separate process, by the variant's name, since a variant's functions cannot be pickled."""
    torch.set_num_threads(threads)
    variant = next(variant for variant in VARIANTS if variant.name == name)
    write_json(file_of(variant, seed, results), run_one(variant, seed, dtype, device=device))
    return f"{name}, seed {seed}"


def main(
    report: Annotated[bool, typer.Option("--report", help="Only the table and the plot.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of runs at a time. They share the threads.")] = 1,
    seeds: Annotated[int, typer.Option(help="Number of seeds of the main rows.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder for records, table and plot.")] = RESULTS,
    device: Device = "cpu",
) -> None:
    """Run what is not finished."""
    if report:
        return write_report(results)
    left = [run for run in plan(seeds) if not file_of(*run, results).is_file()]
    dtype = dtype_of_all(results)
    threads = max(1, torch.get_num_threads() // processes)
    # Spawn processes, since PyTorch's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = [
            pool.submit(_run_to_file, variant.name, seed, results, threads, dtype, device) for variant, seed in left
        ]
        for number, run in enumerate(as_completed(runs), start=1):
            console.print(f"[bold]{run.result()}[/bold]: {number} of {len(runs)}")
            write_report(results)
    write_report(results)


if __name__ == "__main__":
    sys.exit(typer.run(main))
