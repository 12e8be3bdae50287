"""Speed and memory on a GPU, by one command: see `__main__`."""
