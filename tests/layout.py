"""Draw the imports between the parts of the package into docs/layout.md. They are read from the code.

python -m tests.layout            # write the diagram
python -m tests.layout --check    # fail if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

from benchmarks.pages import rewrite

PAGE = Path(__file__).parent.parent / "docs" / "layout.md"
BEGIN, END = "<!-- begin: written by python -m tests.layout -->", "<!-- end -->"
PACKAGE = "peft_crome"


def arrows() -> list[tuple[str, str]]:
    """Return each pair of parts of which the first imports the second. Imports inside functions count."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    children = sorted(graph.find_children(PACKAGE))
    pairs = [(one, other) for one in children for other in children if one != other]
    return [
        (one.rpartition(".")[2], other.rpartition(".")[2])
        for one, other in pairs
        if any(len(chain) == 2 for chain in graph.find_shortest_chains(one, other, as_packages=True))
    ]


def diagram() -> str:
    """Return a Mermaid flow chart with an arrow for each import, except those that a longer path implies."""
    drawn = arrows()
    imports: dict[str, set[str]] = {}
    for one, other in drawn:
        imports.setdefault(one, set()).add(other)

    def reached(start: str) -> set[str]:
        return {name for child in imports.get(start, ()) for name in {child} | reached(child)}

    kept = [(one, other) for one, other in drawn if not any(other in reached(step) for step in imports[one] - {other})]
    lines = [f"    {one} --> {other}" for one, other in kept]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def main() -> None:
    """Write the diagram, or with --check compare it with the page."""
    check = "--check" in sys.argv
    if rewrite(PAGE, BEGIN, END, diagram(), check) and check:
        sys.exit(f"{PAGE.name} shows other imports than the code has. Write: python -m tests.layout")


if __name__ == "__main__":
    main()
