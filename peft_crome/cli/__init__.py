"""peft-crome: one command per task, each in a separate file. No other module imports this package."""

from __future__ import annotations

import sys

EXTRA = 'pip install "peft-crome[train]"'

try:
    from .app import app
    from .doctor import doctor
    from .evaluate import evaluate
    from .export import export
    from .inspect import inspect
    from .plan import plan
    from .train import finetune, preset, train
except ImportError as error:  # typer, rich, pydantic, datasets: the method itself needs none of them
    sys.exit(f"peft-crome needs {error.name!r}, which is not installed. Write: {EXTRA}")

for command in (finetune, train, preset, evaluate, doctor, plan, inspect, export):
    app.command()(command)

__all__ = ["app"]
