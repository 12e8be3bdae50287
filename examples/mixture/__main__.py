"""Run the example: python -m examples.mixture."""

import typer

from .experiment import main

typer.run(main)
