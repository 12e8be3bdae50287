"""Show the progress of a run in one line: loss, tokens a second, memory, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

FORMAT = "{n_fmt}/{total_fmt} steps {percentage:3.0f}%|{bar}|{postfix}, {remaining} left"
OFTEN = 0.5  # seconds between two writes of the line


def memory() -> str:
    """Return the peak memory of this process on its GPU; without a GPU, its present memory.

    Example:
        >>> memory().endswith(" GB")
        True
    """
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


class LastLoss(TrainerCallback):
    """Log the loss of the last step too. A run shorter than `logging_steps` would log none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


class ProgressLine(TrainerCallback):
    """Show transformers' progress bar with the values that a user looks for.

    On a terminal it is one line that is rewritten. Elsewhere, as in a cluster job's file, each logged loss is a line.
    """

    def __init__(self) -> None:
        self.bar: Any = None  # the bar on a terminal
        self.speaks = False  # whether this process prints
        self.loss: torch.Tensor | float = 0.0  # loss of the step on this process
        self.tokens: torch.Tensor | int = 0  # tokens since `since` on this process, without padding
        self.since = self.written = 0.0
        self.begun = (0, 0.0)  # the first step of this run, and when

    def count(self, loss: torch.Tensor, tokens: torch.Tensor) -> None:
        """Note a batch, without waiting for the device."""
        self.loss = self.loss + loss.detach()
        self.tokens = self.tokens + tokens

    def close(self) -> None:
        """End the line, so that the next output starts on a new one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restart()
        self.begun = (state.global_step, self.since)
        self.speaks = state.is_world_process_zero
        if self.speaks and state.global_step:
            print(f"continuing from step {state.global_step} of {state.max_steps}", file=sys.stderr, flush=True)
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,  # above 0 in a continued run
                dynamic_ncols=True,
                bar_format=FORMAT,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            return
        if time.perf_counter() - self.written > OFTEN:
            self.bar.set_postfix_str(self._says(args, float(self.loss)), refresh=False)
            self.written = time.perf_counter()
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self.speaks or logs is None:
            return
        scores = {key: value for key, value in logs.items() if key.startswith("eval_") and not key.endswith("_stderr")}
        if scores:
            score_texts = [
                f"{key.removeprefix('eval_')} {value:.1%} ± {logs.get(f'{key}_stderr', 0):.1%}"
                for key, value in scores.items()
            ]
            tqdm.write(f"step {state.global_step}: {', '.join(score_texts)}", file=sys.stderr)
            self._restart()  # answering is not training
        elif "loss" in logs and self.bar is None:
            done, start = state.global_step - self.begun[0], self.begun[1]
            left = (time.perf_counter() - start) / max(1, done) * (state.max_steps - state.global_step)
            says = self._says(args, float(logs["loss"]))  # the mean since the last line
            line = f"step {state.global_step}/{state.max_steps}: {says}, {tqdm.format_interval(left)} left"
            print(line, file=sys.stderr, flush=True)
            self._restart()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restart()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def _restart(self) -> None:
        self.tokens, self.since = 0, time.perf_counter()

    def _says(self, args: Any, loss: float) -> str:
        # All processes have equally many rows, so one reports for all.
        rate = float(self.tokens) * args.world_size / max(time.perf_counter() - self.since, 1e-9)
        return f"loss {loss:.4g}, {rate:,.0f} tokens/s, {memory()}"
