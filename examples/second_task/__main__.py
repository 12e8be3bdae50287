"""Run the example: python -m examples.second_task."""

import typer

from .experiment import main

typer.run(main)
