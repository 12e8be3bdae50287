"""Benchmarks, each run by `python -m benchmarks.<name>`. Libraries read these variables when they are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing comes from a model hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # use one core
