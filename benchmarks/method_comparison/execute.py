"""Do one run: train, ask, measure the loss on text, and return the record."""

from __future__ import annotations

import hashlib
import json
import resource
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.interleaved import machine
from examples.easy_vqa.data import CAPTION_REQUEST
from examples.easy_vqa.evaluation import accuracies, answer
from examples.easy_vqa.parts import english_text
from examples.easy_vqa.training import Stage, fit
from peft_crome.evaluation import text_loss

from .hosts import (
    DTYPE,
    FROZEN,
    LANGUAGES,
    align,
    attach,
    build,
    load_trained,
    processor,
    save_projection,
    trained_weights,
)
from .plan import characters
from .runs import Run, projection_file
from .settings import Sizes, experiment
from .tasks import TASKS
from .tasks.task import Question, Task, features, words_alone

PACKAGES = ("peft-crome", "peft", "transformers", "torch", "bitsandbytes")
SHORT = 2  # words of a caption that `answer` leaves room for
TUNE_RATE, TUNE_ROWS, TUNE_TOKENS = 5e-5, 4, 256
SPLITS = ("test", "shifted")


class Bench:
    """A host with one method, the processor, and the tasks' images.

    Args:
        run: what is built.
        rate: peak learning rate.
        frozen: how the language model is frozen; None: as the run says.
        language: directory of the language model; None: as the run says.
    """

    def __init__(
        self,
        run: Run,
        rate: float,
        sizes: Sizes,
        results: Path,
        frozen: str | None = None,
        language: Path | None = None,
    ) -> None:
        self.experiment = experiment(run.experiment)
        self.rate, self.sizes, self.seed = rate, sizes, run.seed
        torch.manual_seed(run.seed)
        projection = projection_file(results, run.language, run.seed)
        host = build(language or LANGUAGES[run.language](), frozen or run.frozen, projection)
        self.processor = processor(host, self.experiment.params.soft_tokens)
        self.model = attach(host, self.experiment)
        self._images: dict[str, torch.Tensor] = {}

    def images(self, task: Task) -> torch.Tensor:
        """Return the features of a task's images."""
        if task.name not in self._images:
            self._images[task.name] = features(task, self.processor.image_processor, DTYPE)
        return self._images[task.name]

    def train(self, task: Task, examples: int | None = None) -> dict[str, Any]:
        """Train on a task, on its first `examples` images again and again if given; return what it cost."""
        per_step, steps = self.sizes.images_per_step(task.per_step), self.sizes.steps
        count = steps * per_step
        rows = list(islice(cycle(task.rows(min(examples or count, count), self.seed)), count))
        turns = max(len(row["turns"]) for row in rows)
        stage = Stage("finetune", steps, per_step, turns, learning_rate=self.rate, isolated=turns > 1)
        images = self.images(task)
        start = time.process_time()
        fitted = fit(self.model, stage, self.seed, self.processor, images, None, rows, use_cpu=True)
        return {
            "settings": asdict(stage),
            **fitted,
            "cpu_seconds": round(time.process_time() - start, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "num_trainable_params": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "file_size": saved_bytes(trained_weights(self.model)),
        }

    def ask(self, task: Task, split: str, count: int) -> dict[str, Any]:
        """Score a split of a task."""
        return self.score(task, task.questions(split, count, self.seed), f"{task.title}, {split}")

    def ask_captions(self, task: Task) -> dict[str, Any] | None:
        """Score what the host has learned: captions of test images. None if the task's captions are long."""
        drawn = task.captions("test", self.sizes.kept, self.seed)
        if any(len(text.split()) > SHORT for _, text in drawn):
            return None
        asked = [{"image_id": i, "question": CAPTION_REQUEST, "answer": text, "kind": "caption"} for i, text in drawn]
        return self.score(task, asked, f"{task.title}, captions")

    def score(self, task: Task, asked: list[Question], description: str) -> dict[str, Any]:
        """Answer by greedy generation, and compare with the answers expected."""
        said = answer(self.model, self.processor, self.images(task), asked, description=description)
        return scored(asked, said)

    def text(self, characters: int) -> dict[str, Any]:
        """Measure the loss on English prose, with the method and without it."""
        loss = text_loss(self.model, self.processor.tokenizer, english_text(characters), batch_size=1, progress=False)
        return asdict(loss)


def scored(asked: list[Question], said: list[str]) -> dict[str, Any]:
    """Build the record of some answers.

    Returns:
        accuracy, n, kinds (accuracy, stderr and n by kind), hits (for each image a word with a 1 for each right answer
        and a 0 for each wrong one), and digest, which is equal where the questions are.
    """
    kinds = [row["kind"] for row in asked]
    hits: dict[int, str] = {}
    for row, text in zip(asked, said, strict=True):
        hits[row["image_id"]] = hits.get(row["image_id"], "") + str(int(text == row["answer"]))
    right = sum(flags.count("1") for flags in hits.values())
    return {
        "accuracy": right / len(asked),
        "n": len(asked),
        "kinds": accuracies(tuple(dict.fromkeys(kinds)), list(kinds), asked, said),
        "hits": " ".join(hits.values()),
        "digest": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12],
    }


def saved_bytes(weights: dict[str, torch.Tensor]) -> int:
    """Return the size of a file with these weights."""
    if not weights:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
        return file.stat().st_size


def execute(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> dict[str, Any]:
    """Do one run.

    Args:
        rate: peak learning rate, which the sweep has chosen.
        results: folder of the records, where the host's projection lies.
        output: folder of files that can be made again.
    Returns:
        The record: run_info, train_info, metrics and meta_info, as in PEFT's results.
    """
    start = time.process_time()
    measures = {
        "host": _host,
        "base": _base,
        "sweep": _sweep,
        "main": _main,
        "examples": _examples,
        "sequence": _sequence,
        "change": _change,
    }
    trained, metrics = measures[run.kind](run, rate, sizes, results, output)
    own = experiment(run.experiment) if run.experiment else None
    config = own.peft_config() if own else None
    return {
        "run_info": {
            "run": asdict(run),
            "learning_rate": rate,
            "train_config": own.params.model_dump() if own else None,
            "peft_config": None if config is None else json.loads(json.dumps(config.to_dict(), default=sorted)),
            "sizes": sizes.model_dump(),
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cpu_seconds": round(time.process_time() - start, 1),
        },
        "train_info": trained,
        "metrics": metrics,
        "meta_info": {"machine": machine(), "packages": {name: version(name) for name in PACKAGES}},
    }


def _host(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    torch.manual_seed(run.seed)
    model = build(LANGUAGES[run.language](), run.frozen)
    tasks = [TASKS[name] for name in sizes.tasks]
    fitted = align(model, processor(model), tasks, run.seed, sizes.align_steps, sizes.align_images)
    save_projection(model, projection_file(results, run.language, run.seed))
    return fitted, {}


def _base(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    task, bench = TASKS[run.task], Bench(run, rate, sizes, results)
    metrics: dict[str, Any] = {split: bench.ask(task, split, sizes.test) for split in SPLITS}
    metrics["captions"] = bench.ask_captions(task)
    train = sizes.steps * sizes.images_per_step(task.per_step)
    metrics["words alone"] = {split: words_alone(task, split, sizes.test, run.seed, train) for split in SPLITS}
    return None, metrics


def _sweep(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    task, bench = TASKS[run.task], Bench(run, rate, sizes, results)
    return bench.train(task), {"validation": bench.ask(task, "validation", sizes.validation)}


def _main(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    task, bench = TASKS[run.task], Bench(run, rate, sizes, results)
    trained = bench.train(task)
    metrics: dict[str, Any] = {split: bench.ask(task, split, sizes.test) for split in SPLITS}
    others = [TASKS[name] for name in sizes.tasks if name != task.name]
    metrics["captions of other tasks"] = {
        other.name: score for other in others if (score := bench.ask_captions(other)) is not None
    }
    if length := characters(run, sizes):
        metrics["text"] = bench.text(length)
    return trained, metrics


def _examples(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    task, bench = TASKS[run.task], Bench(run, rate, sizes, results)
    return bench.train(task, run.examples), {"test": bench.ask(task, "test", sizes.test)}


def _sequence(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    bench, tasks = Bench(run, rate, sizes, results), [TASKS[name] for name in sizes.tasks]
    trained, after = {}, {}
    for task in tasks:
        trained[task.name] = bench.train(task)
        after[task.name] = bench.ask(task, "test", sizes.test)
    last = {task.name: bench.ask(task, "test", sizes.test) for task in tasks[:-1]} | {
        tasks[-1].name: after[tasks[-1].name]
    }
    return trained, {"right after": after, "at the end": last}


def _change(run: Run, rate: float, sizes: Sizes, results: Path, output: Path) -> tuple[Any, Any]:
    task, bench = TASKS[run.task], Bench(run, rate, sizes, results)
    trained = bench.train(task)
    metrics = {run.frozen: bench.ask(task, "test", sizes.test)}
    weights = trained_weights(bench.model)

    def moved(**to: Any) -> Bench:
        other = Bench(run, rate, sizes, results, **to)
        load_trained(other.model, weights)
        return other

    for frozen in FROZEN:
        if frozen != run.frozen:
            metrics[frozen] = moved(frozen=frozen).ask(task, "test", sizes.test)
    on_tuned = moved(language=tuned_language(run.language, sizes, output))
    metrics["tuned"] = on_tuned.ask(task, "test", sizes.test)
    on_tuned.train(task)
    metrics["tuned, trained again"] = on_tuned.ask(task, "test", sizes.test)
    return trained, metrics


def tuned_language(name: str, sizes: Sizes, output: Path) -> Path:
    """Return a directory with the language model after a small full fine-tuning on a book, made if needed."""
    folder = output / f"{name}-tuned-{sizes.tune_steps}-steps"
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            source = LANGUAGES[name]()
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
            _tune(model, torch.tensor(tokenizer(english_text(sizes.book), verbose=False).input_ids), sizes.tune_steps)
            unfinished = Path(tempfile.mkdtemp(dir=output))
            model.to(DTYPE).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
    return folder


def _tune(model: nn.Module, ids: torch.Tensor, steps: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNE_RATE)
    for _ in range(steps):
        starts = torch.randint(len(ids) - TUNE_TOKENS, (TUNE_ROWS,))
        batch = torch.stack([ids[start : start + TUNE_TOKENS] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
