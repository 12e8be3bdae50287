"""Run a recipe in one or two processes of its own. A test can have them killed by SIGKILL."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

KILLED = -signal.SIGKILL
SECONDS = 120  # after which a run hangs
# Started once; a process of it begins with all that is imported here.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["peft_crome.training", "peft_crome.data", "torch.distributed.checkpoint"])


def run(
    values: dict[str, Any],
    log: Path,
    *,
    processes: int = 1,
    kill_at: int | None = None,
    record: tuple[Path, Path] | None = None,
    sharded: dict[str, str] | None = None,
    spoil_at: int | None = None,
) -> list[int | None]:
    """Train a recipe with all that its processes print and see in files beside `log`.

    Args:
        values: the recipe.
        log: file to which each process adds a line per batch; see `batches`.
        processes: number of processes, joined by gloo on the CPU.
        kill_at: the step after which the first process is killed, before its checkpoint. The others are then killed
            too, as torchrun does.
        record: a folder, and where to copy it to whenever something in it is about to be written.
        sharded: variables of `accelerate launch` for sharding by accelerate's FSDP2 or DeepSpeed.
        spoil_at: the step, counted from 0, whose gradient is NaN and whose loss is finite.
    Returns:
        Exit codes.
    """
    return spread(partial(_run, values, log, kill_at, record, spoil_at), log, processes, sharded)


def spread(
    target: Callable[[int], None], log: Path, processes: int, environment: dict[str, str] | None = None
) -> list[int | None]:
    """Call a function with 0, 1, ... in processes joined by gloo. Their output is written beside `log`.

    Returns:
        Exit codes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        joined = {key: str(value) for key, value in place.items()} if processes > 1 else {}
        arguments = (target, log, rank, {**os.environ, **joined, **(environment or {})})
        process = CONTEXT.Process(target=_start, args=arguments)
        process.start()
        started.append(process)
    deadline = time.monotonic() + SECONDS
    while any(process.is_alive() for process in started):
        failed = any(process.exitcode not in (None, 0) for process in started)
        if failed or time.monotonic() > deadline:
            for process in started:
                process.kill() if process.is_alive() else None
        time.sleep(0.05)
    assert time.monotonic() < deadline, f"the run hangs; see {log}.0"
    return [process.exitcode for process in started]


def _start(target: Callable[[int], None], log: Path, rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(f"{log}.{rank}", "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}  # its collective for CPUs takes a compiler and minutes
    target(rank)


def _run(
    values: dict[str, Any],
    log: Path,
    kill_at: int | None,
    record: tuple[Path, Path] | None,
    spoil_at: int | None,
    rank: int,
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # workers see their parent die then, and start sooner
    from peft_crome.training import load_recipe, train
    from peft_crome.training import run as module
    from peft_crome.training.loop.sharding import gather_trained

    class Watched(module.CromeTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss + (loss - loss.detach()).sqrt() if self.state.global_step == spoil_at else loss

        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
            digest = hashlib.sha256(b"".join(inputs[key].numpy().tobytes() for key in sorted(inputs)))
            spoilt = self.state.global_step == spoil_at
            before = gather_trained(self.model) if spoilt else {}
            loss = super().training_step(model, inputs, *args)
            if spoilt:
                after = gather_trained(self.model)
                print(f"Changed weights: {[key for key in before if not torch.equal(before[key], after[key])]}")
            line = [rank, self.state.global_step, digest.hexdigest(), loss.item()]
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if kill_at is not None and self.state.global_step == kill_at and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if os.environ.get("ACCELERATE_USE_FSDP") == "true":
                _shard(self)

    module.CromeTrainer = Watched  # type: ignore[misc]
    if record is not None:
        _record(*record)
    if rank > 0:
        _refuse_writing(Path(values["output"]))
    train(load_recipe(values))


def _shard(trainer: Any) -> None:
    """Make accelerate use FSDP2 on the CPU, which it does only on accelerators. Everything else is as on an
    accelerator."""
    state = trainer.accelerator.state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    trainer.is_fsdp_enabled = True


def _refuse_writing(output: Path) -> None:
    """Make this process fail if it writes a stage's directory. Only the first process may write it."""
    places = (f"{output}/", f"{output.with_name(f'.{output.name}.writing')}/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename") and f"{arguments[0]}/".startswith(places):
            writes = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            if writes:
                raise RuntimeError(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def _record(home: Path, states: Path) -> None:
    """Copy `home` before each write to it, and also with the written file cut off in the middle."""
    busy = False
    seen: list[list[tuple[Path, bytes]]] = []

    def copy(name: str, cut: Path | None = None) -> None:
        number = len(list(states.iterdir())) if states.is_dir() else 0
        target = states / f"{number:03} {name}"
        shutil.copytree(home, target) if home.is_dir() else target.mkdir(parents=True)
        if cut is not None:
            file = target / cut.relative_to(home)
            content = file.read_bytes() if file.is_file() else b""
            file.write_bytes(content[: len(content) // 2])
        files = sorted(path for path in target.rglob("*") if path.is_file())
        found = [(path.relative_to(target), path.read_bytes()) for path in files]
        if found in seen:  # as it was before
            shutil.rmtree(target)
        seen.append(found)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or not arguments or not str(arguments[0]).startswith(str(home)):
            removes = event == "os.remove" and len(arguments) > 1 and arguments[1] != -1  # of rmtree, by descriptor
            if busy or not removes:
                return
        path = Path(os.fsdecode(arguments[0]))
        busy = True
        try:
            if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
                copy(path.name)
                copy(f"{path.name} (empty)", cut=path)
            elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
                copy(f"{path.name} ({event})")
        finally:
            busy = False

    def watched(write: Any, place: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            path = Path(os.fsdecode(args[place]))
            inside = not busy and path.is_relative_to(home)
            if inside:
                copy(path.name)
            busy, before = True, busy  # what happens inside is one write
            try:
                result = write(*args, **kwargs)
                if inside:
                    copy(f"{path.name} (half)", cut=path)
            finally:
                busy = before
            return result

        return call

    sys.addaudithook(hook)
    # These open their files in C++ and in Rust.
    torch.save = watched(torch.save, 1)
    safetensors.torch.serialize_file = watched(safetensors.torch.serialize_file, 1)


def batches(log: Path) -> dict[tuple[int, int], list[tuple[str, float]]]:
    """Return (process, steps done before) -> digest of each batch that was trained on, and its loss.

    For a step that was done again after a restart, only the last run counts.
    """
    found: dict[tuple[int, int], list[tuple[str, float]]] = {}
    before: dict[int, int] = {}
    for line in log.read_text().splitlines():
        rank, step, digest, loss = json.loads(line)
        if before.get(rank) != step:
            found[rank, step] = []
        before[rank] = step
        found[rank, step].append((digest, loss))
    return found
