"""README and docs run: every Python block of a page, in order, in one namespace and an empty directory.

A block that cannot run here says why, in a comment right above it: <!-- not run: downloads a 14 GB model -->. Such
blocks must still be Python, and are counted in NOT_RUN, so that one more of them is a decision.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])
NOT_RUN = {"README.md": 2, "docs/index.md": 1, "docs/models.md": 3, "docs/saving.md": 1, "docs/sharing.md": 2}

FENCE = re.compile(r"^(?P<indent>[ ]*)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.S | re.M)
EXCUSE = re.compile(r"<!-- not run:(?P<reason>.*?)-->\s*\Z", re.S)


class Block(NamedTuple):
    page: str
    line: int  # of the first line of code, counted from 1
    code: str
    not_run: str | None  # the reason, possibly empty

    def compile(self):
        # As many empty lines above as in the page: a traceback then points into the page.
        return compile("\n" * (self.line - 1) + self.code, str(ROOT / self.page), "exec")


def fences(page: str) -> list[re.Match[str]]:
    return list(FENCE.finditer((ROOT / page).read_text(encoding="utf-8")))


def python_blocks(page: str) -> list[Block]:
    blocks = []
    for fence in fences(page):
        if fence["language"].strip() != "python":
            continue
        excuse = EXCUSE.search(fence.string[: fence.start()])
        line = fence.string[: fence.start("body")].count("\n") + 1
        reason = excuse["reason"].strip() if excuse else None
        blocks.append(Block(page, line, textwrap.dedent(fence["body"]), reason))
    return blocks


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.not_run is None for b in python_blocks(page))])
def test_python_blocks_of_the_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page):
        if block.not_run is None:
            exec(block.compile(), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_do_not_run_are_python_and_say_why(page: str) -> None:
    left_out = [block for block in python_blocks(page) if block.not_run is not None]
    for block in left_out:
        print(f"{page}:{block.line} is not run: {block.not_run}")
        assert block.not_run, f"{page}:{block.line}: write the reason into <!-- not run: ... -->"
        block.compile()
    assert len(left_out) == NOT_RUN.get(page, 0), f"{page}: {len(left_out)} blocks are not run; say so in NOT_RUN"


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_in_a_language_that_is_checked_or_is_no_python(page: str) -> None:
    languages = {fence["language"].strip() for fence in fences(page)}
    assert languages <= {"python", "bash", "json", "text"}, f"{page}: {languages}"


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = set(re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", text, re.M)) | set(
            re.findall(r"`make ([a-z-]+)", text)
        )
        assert named <= targets, f"{page}: no such target: {sorted(named - targets)}"
