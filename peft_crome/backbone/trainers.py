"""Check each `transformers.Trainer` once it is made; the adapter and the composite register their checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

CHECKS: list[Callable[[Any], None]] = []  # each gets the trainer and raises ValueError or returns


def watch_trainers() -> None:
    """Run `CHECKS` on each trainer that is made from now on; idempotent.

    Called when an adapter is attached or a composite is made, and not at import: importing the trainer takes half a
    second.
    """
    from transformers import Trainer

    start = Trainer.__init__
    if getattr(start, "runs_checks", False):
        return

    @functools.wraps(start)
    def start_and_check(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        for check in CHECKS:
            check(self)

    start_and_check.runs_checks = True  # type: ignore[attr-defined]
    Trainer.__init__ = start_and_check
