"""python -m peft_crome: the command line."""

from .cli import app

app(prog_name="peft-crome")
