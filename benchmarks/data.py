"""Rows a second and peak memory of reading LLaVA files, from 10,000 to 1,000,000 rows.

    python -m benchmarks.data                  # everything that is not done yet; about ten minutes
    python -m benchmarks.data --rows 10000

Rows as in the 665K mix: 1.4 KB, several turns, an image in nine of ten, which is looked for and not opened (what
opening costs depends on the images). Each way of reading runs in a process of its own and counts what it yields;
memory is the largest of samples, 50 a second, of the process's own pages (RssAnon, Linux): the pages of mapped files,
which `datasets` reads its tables through, are the kernel's to drop.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import matplotlib
import typer

from benchmarks.interleaved import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "data"
SIZES = (10_000, 100_000, 1_000_000)
PICTURES = 1000  # files, which rows share
SAID = "The image shows a street with some cars, a bicycle and two people who wait for the light to change. "


def write_file(path: Path, rows: int) -> None:
    """A JSON list as published, written row by row, and the files that it names."""
    for number in range(PICTURES):
        (path.parent / f"{number}.jpg").touch()
    with path.open("w") as file:
        for number in range(rows):
            turns = []
            for turn in range(4):
                question = f"What is seen in part {turn} of image {number}?"
                if turn == 0 and number % 10:
                    question = f"<image>\n{question}"
                turns.append({"from": "human", "value": question})
                turns.append({"from": "gpt", "value": SAID * (1 + (number + turn) % 3)})
            row: dict[str, Any] = {"id": f"{number:09d}", "conversations": turns}
            row |= {"image": f"{number % PICTURES}.jpg"} if number % 10 else {"model": ""}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]")


def diagnose(path: Path) -> int:
    """`peft-crome doctor --no-open-images`."""
    from peft_crome.data.doctor import examine

    findings = examine(path, open_images=False)
    assert not findings.patients, findings.patients[0]
    return findings.rows


def convert(path: Path) -> int:
    """The first time that a recipe names the file: converted, and every image looked for."""
    from peft_crome.data import check_files, load_rows

    rows = load_rows(path)
    check_files(rows)
    return len(rows)


def epoch(path: Path) -> int:
    """An epoch over a mixture of the file with itself, batches of 32, after the conversion."""
    from peft_crome.data import load_rows, mix, mixture_probabilities

    rows = load_rows(path)
    mixture = mix([rows, rows], mixture_probabilities([len(rows), len(rows)]), seed=0)
    return sum(len(batch["id"]) for batch in mixture.iter(32))


def streaming(path: Path) -> int:
    """An epoch of `streaming: true`."""
    from peft_crome.data import load_rows

    return sum(1 for _ in load_rows(path, streaming=True))


WAYS: dict[str, Callable[[Path], int]] = {
    "doctor": diagnose,
    "first reading": convert,
    "an epoch of a mixture": epoch,
    "streaming": streaming,
}


def measure(way: str, path: Path) -> dict[str, Any]:
    """Run in a process of its own: seconds, rows and bytes."""
    import peft_crome.data  # noqa: F401

    samples = [_own_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            samples.append(_own_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    rows = WAYS[way](path)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return {"rows": rows, "seconds": seconds, "peak_bytes": max(samples), "bytes_after_import": samples[0]}


def _own_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def run(sizes: list[int]) -> list[dict[str, Any]]:
    """Measure what is not in the records yet."""
    file = RESULTS / "records.json"
    records: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    RESULTS.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        if all((record["size"], record["way"]) != (size, "streaming") for record in records):
            records = [record for record in records if record["size"] != size] + _measure_size(size)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(sorted(records, key=lambda record: record["size"]), indent=1) + "\n")
            temporary.replace(file)
    return sorted(records, key=lambda record: record["size"])


def _measure_size(size: int) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="rows-"))
    records = []
    try:
        path = folder / "mix.json"
        write_file(path, size)
        for way in WAYS:  # `an epoch` finds what `first reading` has converted
            result = subprocess.run(
                [sys.executable, "-m", "benchmarks.data", "--way", way, "--file", str(path)],
                env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")},
                stdout=subprocess.PIPE,
                check=True,
            )
            records.append(
                {
                    "size": size,
                    "way": way,
                    "file_bytes": path.stat().st_size,
                    **json.loads(result.stdout.splitlines()[-1]),
                }
            )
            print(records[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Rows a second and peak memory, a row per way."""
    sizes = sorted({record["size"] for record in records})
    header = ["", *(f"{size:,}: rows/s" for size in sizes), *(f"{size:,}: peak, MB" for size in sizes)]
    lines = []
    for way in WAYS:
        of_way = {record["size"]: record for record in records if record["way"] == way}
        speeds = [f"{of_way[size]['rows'] / of_way[size]['seconds']:,.0f}" for size in sizes]
        peaks = [f"{of_way[size]['peak_bytes'] / 1e6:,.0f}" for size in sizes]
        lines.append([way, *speeds, *peaks])
    return markdown(header, lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Both over the number of rows."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way in WAYS:
        of_way = [record for record in records if record["way"] == way]
        sizes = [record["size"] for record in of_way]
        speed.plot(sizes, [record["rows"] / record["seconds"] for record in of_way], marker="o", label=way)
        memory.plot(sizes, [record["peak_bytes"] / 1e6 for record in of_way], marker="o", label=way)
    speed.set(xscale="log", yscale="log", xlabel="rows", ylabel="rows a second")
    memory.set(
        xscale="log", xlabel="rows", ylabel="largest memory of the process, MB", ylim=(0, 1.05 * memory.get_ylim()[1])
    )
    figure.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=len(WAYS), fontsize=9)
    for axis in (speed, memory):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Sizes; several times for several.")] = None,
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
    file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, write and print."""
    if way is not None and file is not None:
        print(json.dumps(measure(way, file)))
        return
    records = run(list(rows or SIZES))
    (RESULTS / "table.md").write_text(table(records))
    plot(records, RESULTS / "rows_and_memory.png")
    print(table(records))


if __name__ == "__main__":
    typer.run(main)
