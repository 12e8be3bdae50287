"""Measure speed and memory on a GPU with one command: see `__main__`."""
