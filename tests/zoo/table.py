"""Write the table of `docs/models.md` from the results of the last test run.

Run `python -m tests.zoo.table`, or add `--check` to compare only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.pages import rewrite
from tests.zoo import REFUSED, ZOO
from tests.zoo.test_language import PER_TOKEN
from tests.zoo_results import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: written by python -m tests.zoo.table -->", "<!-- end -->"
CHECKS = (
    "identity", "count", "vision", "text", "gradients", "save", "generate", "disable", "fold", "merge_and_unload",
    "unload", "words", "words_are_generated", "decoding_costs_nothing", "words_beside_an_image",
)  # fmt: skip


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the architectures that work, notes on the checks that do not apply, and refused ones.

    Raises:
        ValueError: an architecture or a check is missing from the results.
    """
    missing = [name for name in ZOO if not set(CHECKS) <= set(found.get(name, {}).get("checks", {}))]
    if missing:
        raise ValueError(f"No results for {missing}. Run the whole zoo: python -m pytest tests/zoo.")
    mapped = [name for name in ZOO if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    passed = [name for name in mapped if all(ok(check) for check in found[name]["checks"].values())]
    notes: list[str] = []
    lines = [
        f"{len(passed)} of the {len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)} architectures in transformers' "
        "image-text-to-text mapping pass every check that applies to them.",
        "",
        "| `model_type` | class | vision, audio and others | text | weights at the known size | "
        "words beside an image | checks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(ZOO):
        own, checks = found[name]["properties"], found[name]["checks"]
        sites = {branch: "<br>".join(f"`{site}`" for site in paths) for branch, paths in own["sites"].items()}
        others = "<br>".join(sites[branch] for branch in sites if branch != "text")
        size = f"{own['parameters']:,} (d = {own['width']:,})" if "parameters" in own else "-"
        beside = own.get("beside") or "-"
        failed = [check for check in checks if not ok(checks[check])]
        said = "all" if not failed else "not " + ", ".join(failed)
        left_out = {f"{what}: {reason}" for what, reason in own["not_applicable"].items()}
        left_out |= {f"decoding: {PER_TOKEN[name]}"} if name in PER_TOKEN else set()
        if left_out:
            notes += [reason for reason in sorted(left_out) if reason not in notes]
            said += ", where they apply " + ", ".join(f"[{notes.index(reason) + 1}]" for reason in sorted(left_out))
        lines.append(f"| `{name}` | `{own['class']}` | {others} | {sites['text']} | {size} | {beside} | {said} |")
    lines += ["", *(f"[{number}] {reason}  " for number, reason in enumerate(notes, start=1))]
    if REFUSED:
        lines += ["", "| refused | why |", "|---|---|"]
        lines += [f"| `{name}` | {reason} |" for name, (reason, _) in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


def ok(check: dict[str, str]) -> bool:
    """Return whether a check passed or does not apply."""
    return check["outcome"] != "failed"


def main() -> None:
    """Write the table, or compare it with `--check`."""
    check = "--check" in sys.argv
    if rewrite(PAGE, BEGIN, END, table(json.loads(RESULTS.read_text())), check) and check:
        sys.exit(f"{PAGE.name} is out of date. Write: python -m pytest tests/zoo && python -m tests.zoo.table")


if __name__ == "__main__":
    main()
