"""Write the table of `docs/models.md` that lists which families one command trains. The tests run the same families.

python -m tests.families.table            # write it
python -m tests.families.table --check    # fail if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.pages import rewrite

from . import ABSENT, FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: written by python -m tests.families.table -->", "<!-- end of the families -->"


def table() -> str:
    """Return the table in Markdown, with a row for each family."""
    heads = ("family", "trains by one command", "several images", "videos", "sound", "what is special")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, family in sorted(FAMILIES.items()):
        taken = ("yes" if kind else "no" for kind in (family.several_images, family.video, family.audio))
        lines.append(f"| `{name}` | {family.trains} | {' | '.join(taken)} | {special(family)} |")
    lines += [f"| `{name}` | no: {why} | | | | |" for name, why in sorted(ABSENT.items())]
    return "\n".join(lines)


def special(family: Family) -> str:
    """Return the properties of a family that someone who prepares data for it should know."""
    said = {
        "takes no system message": not family.system,
        "images come before a turn's words": family.images_first,
        "words of a turn are stripped": family.strips,
        "recipes end its answers": family.chat_template and (family.end_of_turn is None or not family.closes_last),
        "one answer a row": family.chat_template and not (family.prompt_is_prefix and family.keeps_turns),
    }
    return "; ".join(text for text, holds in said.items() if holds)


def main() -> None:
    """Write the table, or with `--check` compare it with the page."""
    check = "--check" in sys.argv
    if rewrite(PAGE, BEGIN, END, table(), check) and check:
        sys.exit(f"{PAGE.name} is out of date. Write: python -m tests.families.table")


if __name__ == "__main__":
    main()
