"""Run the command line: python -m peft_crome."""

from .cli import app

app(prog_name="peft-crome")
