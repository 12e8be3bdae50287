"""Measure rows a second and peak memory of reading LLaVA files, from 10,000 to 1,000,000 rows.

    python -m benchmarks.data                  # everything that is not finished; about half an hour
    python -m benchmarks.data --rows 10000

Rows are like those of the 665K mix: 1.4 KB, several turns, an image in nine of ten. Images are looked up and not
decoded, since the cost of decoding depends on the images. `doctor --model` counts tokens and opens the header of each
row's image for that. Its processor is Qwen2.5-VL's with the published sizes and the tokenizer of tests/families, and
needs the packages of tests/families/packages.txt. Each way of reading runs in a separate process and counts its rows.
Memory is the largest of 50 samples a second of the process's private pages (RssAnon, Linux). The kernel may drop the
pages of mapped files, through which `datasets` reads its tables.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import matplotlib.pyplot as plt
import typer
from PIL import Image

from benchmarks.devices import in_fresh_process, status
from benchmarks.interleaved import markdown, save_plot

RESULTS = Path(__file__).parent / "results" / "data"
PICTURES = 1000  # number of files, which rows share
PIXELS = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (612, 612), (1024, 768), (336, 336))
SAID = "The image shows a street with some cars, a bicycle and two people who wait for the light to change. "


def write_file(path: Path, rows: int) -> None:
    """Write a JSON list in the published format, row by row, and the files that it names."""
    for number in range(PICTURES):
        Image.new("RGB", PIXELS[number % len(PIXELS)]).save(path.parent / f"{number}.jpg")
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
    """Run `peft-crome doctor --no-open-images`."""
    from peft_crome.data.doctor import examine

    findings = examine(path, open_images=False)
    assert not findings.patients, findings.patients[0]
    return findings.rows


def count_tokens(path: Path) -> int:
    """Run `peft-crome doctor --no-open-images --model`."""
    import tests.torchvision_on_cpu  # noqa: F401  # before transformers imports it

    # isort: split

    from transformers import AutoProcessor

    from peft_crome.data import ConversationCollator
    from peft_crome.data.doctor import examine

    collator = ConversationCollator(AutoProcessor.from_pretrained(path.parent / "model"), ends_answers=True)
    findings = examine(path, open_images=False, measure=collator.measure)
    assert not findings.patients, findings.patients[0]
    return sum(findings.histograms["tokens in a row"].values())


def convert(path: Path) -> int:
    """Read the file as a recipe does the first time: convert it and look up every image."""
    from peft_crome.data import check_files, load_rows

    rows = load_rows(path)
    check_files(rows)
    return len(rows)


def epoch(path: Path) -> int:
    """Read an epoch of a mixture of the file with itself in batches of 32, after the conversion."""
    from peft_crome.data import load_rows, mix, mixture_probabilities

    rows = load_rows(path)
    mixture = mix([rows, rows], mixture_probabilities([len(rows), len(rows)]), seed=0)
    return sum(len(batch["id"]) for batch in mixture.iter(32))


def streaming(path: Path) -> int:
    """Read an epoch with `streaming: true`."""
    from peft_crome.data import load_rows

    return sum(1 for _ in load_rows(path, streaming=True))


WAYS: dict[str, Callable[[Path], int]] = {
    "doctor": diagnose,
    "first reading": convert,
    "an epoch of a mixture": epoch,  # of the rows that `first reading` has converted
    "streaming": streaming,
    "doctor --model": count_tokens,
}
SIZES = dict.fromkeys(WAYS, (10_000, 100_000, 1_000_000)) | {"doctor --model": (10_000, 100_000, 665_000)}


def measure(way: str, path: Path) -> dict[str, Any]:
    """Measure one way in a separate process: seconds, rows and bytes."""
    import peft_crome.data  # noqa: F401

    samples = [status("RssAnon")]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            samples.append(status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    rows = WAYS[way](path)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    done.set()
    sampler.join()
    return {
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": max(samples),
        "bytes_after_import": samples[0],
    }


def run(sizes: list[int]) -> list[dict[str, Any]]:
    """Measure all sizes that have no record yet."""
    file = RESULTS / "records.json"
    records: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    RESULTS.mkdir(parents=True, exist_ok=True)
    for size in sizes or sorted({size for of_way in SIZES.values() for size in of_way}):
        done = {record["way"] for record in records if record["size"] == size}
        ways = [way for way in WAYS if way not in done and (sizes or size in SIZES[way])]
        records = sorted([*records, *_measure_size(size, ways)], key=lambda record: record["size"])
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(records, indent=1) + "\n")
        temporary.replace(file)
    return records


def _measure_size(size: int, ways: list[str]) -> list[dict[str, Any]]:
    if not ways:
        return []
    records = []
    with tempfile.TemporaryDirectory(prefix="rows-") as name:
        folder = Path(name)
        path = folder / "mix.json"
        write_file(path, size)
        if "doctor --model" in ways:
            from tests.families import FAMILIES

            FAMILIES["qwen2_5_vl"].build(folder / "model")
        for way in ways:
            arguments = ["--way", way, "--file", str(path)]
            result = in_fresh_process("benchmarks.data", *arguments, HF_DATASETS_CACHE=str(folder / "cache"))
            records.append(
                {
                    "size": size,
                    "way": way,
                    "file_bytes": path.stat().st_size,
                    "load_average": os.getloadavg()[0],
                    **result,
                }
            )
            print(records[-1], flush=True)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Format rows a second and peak memory, a row per way; one table for all ways with the same rows."""
    sizes_of = {way: tuple(sorted(record["size"] for record in records if record["way"] == way)) for way in WAYS}
    return "\n".join(
        _table(records, [way for way in WAYS if sizes_of[way] == sizes], sizes)
        for sizes in dict.fromkeys(sizes_of.values())
        if sizes
    )


def _table(records: list[dict[str, Any]], ways: list[str], sizes: tuple[int, ...]) -> str:
    header = ["", *(f"{size:,}: rows/s" for size in sizes), *(f"{size:,}: peak, MB" for size in sizes)]
    lines = []
    for way in ways:
        of_way = {record["size"]: record for record in records if record["way"] == way}
        speeds = [f"{of_way[size]['rows'] / _seconds(of_way[size]):,.0f}" for size in sizes]
        peaks = [f"{of_way[size]['peak_bytes'] / 1e6:,.0f}" for size in sizes]
        lines.append([way, *speeds, *peaks])
    return markdown(header, lines)


def _seconds(record: dict[str, Any]) -> float:
    """Return the processor's seconds if they were recorded, which exclude other work on the machine."""
    return float(record.get("cpu_seconds", record["seconds"]))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Plot both over the number of rows."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way in WAYS:
        of_way = [record for record in records if record["way"] == way]
        sizes = [record["size"] for record in of_way]
        speed.plot(sizes, [record["rows"] / _seconds(record) for record in of_way], marker="o", label=way)
        memory.plot(sizes, [record["peak_bytes"] / 1e6 for record in of_way], marker="o", label=way)
    speed.set(xscale="log", yscale="log", xlabel="rows", ylabel="rows a second")
    memory.set(
        xscale="log", xlabel="rows", ylabel="largest memory of the process, MB", ylim=(0, 1.05 * memory.get_ylim()[1])
    )
    figure.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=len(WAYS), fontsize=9)
    for axis in (speed, memory):
        axis.grid(alpha=0.3)
    save_plot(figure, path)


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Number of rows. Repeatable.")] = None,
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
    file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, write and print the results."""
    if way is not None and file is not None:
        print(json.dumps(measure(way, file)))
        return
    records = run(list(rows or ()))
    (RESULTS / "table.md").write_text(table(records))
    plot(records, RESULTS / "rows_and_memory.png")
    print(table(records))


if __name__ == "__main__":
    typer.run(main)
