"""Measure what `import peft_crome` adds to `import peft`: medians over fresh interpreters, in turn.

python benchmarks/import_time.py [--runs 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CODES = {"import peft": "import peft", "import peft; import peft_crome": "import peft; import peft_crome"}


def seconds(code: str) -> float:
    """Return the wall-clock seconds of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print both medians, their spread and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15, help="interpreters started for each of the two")
    runs = parser.parse_args().runs
    for code in CODES.values():
        seconds(code)  # compiles missing bytecode and fills the disk's cache
    taken: dict[str, list[float]] = {name: [] for name in CODES}
    for run in range(runs):
        for name in sorted(CODES, reverse=bool(run % 2)):  # in turn, with alternating order
            taken[name].append(seconds(CODES[name]))
    for name, times in taken.items():
        print(
            f"{name:32} median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f} s, {runs} runs"
        )
    alone, both = (statistics.median(times) for times in taken.values())
    print(f"ratio of the medians: {both / alone:.3f}")


if __name__ == "__main__":
    main()
