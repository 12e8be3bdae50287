"""Run the tests in the environments of tests/matrix.toml and write docs/versions.md: python -m tests.matrix [row ...].

Each row's environment is made once, in $MATRIX or by default in build/matrix. It is made by uv if uv is on the PATH,
otherwise by pip.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import rewrite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own there


ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("MATRIX") or ROOT / "build" / "matrix").absolute()
ROWS: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "tests" / "matrix.toml").read_text(encoding="utf-8"))
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- begin: written by python -m tests.matrix -->", "<!-- end -->"
TORCH = "torch==2.13.0"
NAMED = ("transformers", "peft", "torch", "accelerate", "huggingface_hub")
TOOLS = ("bitsandbytes==0.50.2", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "sentencepiece", "typer")
QUICK = ("-m", "not slow and not gpu", "-k", "not compile")
# What is run -> pytest's words for a row with the composite and for one without; None: nothing.
PARTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "fast tests": (
        (*QUICK, "tests/tuner", "tests/vlm", "tests/test_versions.py"),
        (*QUICK, "tests/tuner", "tests/test_versions.py"),
    ),
    "zoo": (("tests/zoo/test_zoo.py", "-k", "test_identity or test_save"),) * 2,
    "zoo's first eight": ((*QUICK, "tests/zoo"),) * 2,
    "first example": (
        ("tests/test_docs.py", "-k", "blocks_of_the_page_run and README"),
        ("tests/examples/test_examples.py", "-k", "attach_to_llava"),
    ),
}


def environment(name: str) -> Path:
    """Return the interpreter of a row. Its environment is made again if its packages have changed."""
    row, folder = ROWS[name], BUILD / name
    python, made = folder / "bin" / "python", folder / "packages"
    extras = "[train]" if row.get("composite") else ""
    # PyTorch first, by itself: its words may name an index, and nothing else then brings in another.
    torch = [word for word in row["packages"] if word.startswith("torch==")] or os.environ.get("TORCH", TORCH).split()
    words = [*row["packages"], "-e", f".{extras}", *TOOLS]
    said = " ".join([*torch, *words])
    if not made.is_file() or made.read_text(encoding="utf-8") != said:
        if uv := shutil.which("uv"):
            make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)]
            install = [uv, "pip", "install", "--quiet", "--python", str(python)]
        else:
            make = [sys.executable, "-m", "venv", "--clear", str(folder)]
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (make, [*install, *torch], [*install, *words]):
            subprocess.run(command, check=True, cwd=ROOT)
        made.write_text(said, encoding="utf-8")
    return python


def run(name: str, parts: Sequence[str], workers: str) -> dict[str, Any]:
    """Run a row's tests. Return the installed releases and, for each part, what passed, what failed upstream and what
    failed because of this package."""
    python = environment(name)
    code = f"import importlib.metadata as m; print(*map(m.version, {NAMED}))"
    versions = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.split()
    of_row = {"python": ".".join(map(str, sys.version_info[:2])), **dict(zip(NAMED, versions, strict=True))}
    known = BUILD / f"{name}.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    result: dict[str, Any] = {"versions": of_row, "date": datetime.date.today().isoformat(), "parts": {}}
    if before.get("versions") == of_row:
        result["parts"] = before["parts"]
    for part in parts:
        outcomes = BUILD / f"{name}.outcomes.json"
        outcomes.unlink(missing_ok=True)
        start = time.monotonic()
        # Old releases warn of other things, so here warnings are no errors.
        command = [str(python), "-m", "pytest", "-q", "-W", "default", "-p", "tests.upstream", "-n", workers]
        words = PARTS[part][0 if ROWS[name].get("composite") else 1]
        subprocess.run([*command, f"--upstream={outcomes}", *words], cwd=ROOT)
        if not outcomes.is_file():
            raise SystemExit(f"{name}: {part}: pytest wrote no outcomes.")
        result["parts"][part] = json.loads(outcomes.read_text(encoding="utf-8"))
        print(f"{name}: {part}: {_cell(result['parts'][part])} in {time.monotonic() - start:.0f} s", flush=True)
        known.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _cell(outcomes: dict[str, Any] | None) -> str:
    if outcomes is None:
        return "not run"
    return f"{outcomes['passed']} / {len(outcomes['upstream'])} / {len(outcomes['ours'])}"


def page_of(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of results, followed by the failures upstream for each row."""
    parts = [part for part in PARTS if any(part in result["parts"] for result in results.values())]
    lines = [f"| row | Python | {' | '.join(NAMED)} | {' | '.join(parts)} | date |"]
    lines.append("| --- " * (len(NAMED) + len(parts) + 3) + "|")
    for name, result in results.items():
        versions = [result["versions"][package] for package in ("python", *NAMED)]
        cells = [_cell(result["parts"].get(part)) for part in parts]
        lines.append(f"| {' | '.join([name, *versions, *cells, result['date']])} |")
    lines += ["", "What fails upstream:", ""]
    for name, result in results.items():
        reasons = sorted({why for part in result["parts"].values() for why in part["upstream"].values()})
        said = [f"    - `{_short(reason)}`" for reason in reasons] or ["    - nothing in what was run"]
        lines += [f"- {name} (transformers {result['versions']['transformers']})", *said]
    return "\n".join(lines)


def _short(reason: str) -> str:
    own_words, _, _ = reason.partition("\nassert ")  # pytest adds the values
    line = " ".join(own_words.replace("`", "'").split())
    return line if len(line) < 180 else line[:177] + "..."


def main() -> None:
    """Run the named rows, by default all of them. With --ci, run those of CI and leave the page unchanged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--ci", action="store_true", help="the rows of CI and a part of the tests; writes no page")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page from the last results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="of the tests; all by default")
    parser.add_argument("--workers", default="1", help="processes of pytest-xdist; 0: none")
    arguments = parser.parse_args()
    rows = arguments.rows or [name for name, row in ROWS.items() if row.get("ci") or not arguments.ci]
    parts = arguments.parts or [part for part in PARTS if part != ("zoo" if arguments.ci else "zoo's first eight")]
    results = {} if arguments.page else {name: run(name, parts, arguments.workers) for name in rows}
    if not arguments.ci:
        known = {name: BUILD / f"{name}.json" for name in ROWS}
        text = page_of({name: json.loads(path.read_text()) for name, path in known.items() if path.is_file()})
        rewrite(PAGE, BEGIN, END, text)
    ours = {name: part["ours"] for name, row in results.items() for part in row["parts"].values() if part["ours"]}
    for name, failures in ours.items():
        print(f"{name}: failed by peft_crome:", *failures, sep="\n  ")
    sys.exit(bool(ours))


if __name__ == "__main__":
    main()
