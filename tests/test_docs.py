"""Test that the Python blocks of README and docs run, page by page, in one namespace and an empty directory.

If a block cannot run, a comment right above it gives the reason: <!-- not run: downloads a 14 GB model -->. Such
blocks must still be Python. NOT_RUN counts them, so that each new one is a decision.

A line --8<-- "name.md" stands for docs/includes/name.md, as in mkdocs. A model that a block loads by its Hub name is a
folder of that name in the page's directory, with tiny random weights. STAND_INS lists these models.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.matrix import PAGE as VERSIONS
from tests.matrix import ROWS
from tests.stand_ins import save_dinov2, save_smollm, save_smolvlm

ROOT = Path(__file__).parent.parent
INCLUDES = ROOT / "docs" / "includes"
UPSTREAM = ROOT / "docs" / "upstream"  # no pages of ours; tests/conformity/test_upstream.py runs its reports
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")]
    if path.parent != INCLUDES and UPSTREAM not in path.parents
)
OUTSIDE_THE_SITE = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", ".github/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
STAND_INS = {
    "README.md": {
        "HuggingFaceTB/SmolVLM-256M-Instruct": save_smolvlm,
        "HuggingFaceTB/SmolLM2-135M-Instruct": save_smollm,
        "facebook/dinov2-small": save_dinov2,
    },
    "docs/finetune.md": {"HuggingFaceTB/SmolVLM-256M-Instruct": save_smolvlm},
    "docs/trl.md": {"HuggingFaceTB/SmolVLM-256M-Instruct": save_smolvlm},
}
NOT_RUN = {
    "docs/composite.md": 2,
    "docs/distributed.md": 1,
    "docs/index.md": 1,
    "docs/models.md": 1,
    "docs/saving.md": 1,
    "docs/serving.md": 1,
    "docs/sharing.md": 2,
}

FENCE = re.compile(r"^(?P<indent>[ ]*)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.S | re.M)
INCLUDE = re.compile(r'^--8<-- "(?P<include>[^"\n]+)"$', re.M)
PART = re.compile(f"{FENCE.pattern}|{INCLUDE.pattern}", re.S | re.M)
EXCUSE = re.compile(r"<!-- not run:(?P<reason>.*?)-->\s*\Z", re.S)


class Block(NamedTuple):
    file: str  # the page, or what it includes
    line: int  # of the first line of code, counted from 1
    code: str
    not_run: str | None  # the reason, possibly empty

    def compile(self):
        # As many empty lines above as in the page: a traceback then points into the page.
        return compile("\n" * (self.line - 1) + self.code, str(ROOT / self.file), "exec")


def fences(page: str) -> list[tuple[str, re.Match[str]]]:
    """Return each fence of the page in order with its file, which is the page or a file that it includes."""
    found = []
    for part in PART.finditer((ROOT / page).read_text(encoding="utf-8")):
        if part["include"]:
            path = INCLUDES / part["include"]
            inner = FENCE.finditer(path.read_text(encoding="utf-8"))
            found += [(path.relative_to(ROOT).as_posix(), fence) for fence in inner]
        else:
            found.append((page, part))
    return found


def python_blocks(page: str) -> list[Block]:
    blocks = []
    for file, fence in fences(page):
        if fence["language"].strip() != "python":
            continue
        excuse = EXCUSE.search(fence.string[: fence.start()])
        line = fence.string[: fence.start("body")].count("\n") + 1
        reason = excuse["reason"].strip() if excuse else None
        blocks.append(Block(file, line, textwrap.dedent(fence["body"]), reason))
    return blocks


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default, without a GPU
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # TRL's SFTConfig sets it
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.not_run is None for b in python_blocks(page))])
def test_python_blocks_of_the_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, save in STAND_INS.get(page, {}).items():
        save(tmp_path / name)
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page):
        if block.not_run is None:
            exec(block.compile(), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_do_not_run_are_python_and_say_why(page: str) -> None:
    left_out = [block for block in python_blocks(page) if block.not_run is not None]
    for block in left_out:
        print(f"{block.file}:{block.line} is not run: {block.not_run}")
        assert block.not_run, f"{block.file}:{block.line}: write the reason into <!-- not run: ... -->"
        block.compile()
    assert len(left_out) == NOT_RUN.get(page, 0), f"{page}: {len(left_out)} blocks are not run; say so in NOT_RUN"


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_in_a_language_that_is_checked_or_is_no_python(page: str) -> None:
    languages = {fence["language"].strip() for _, fence in fences(page)}
    assert languages <= {"python", "bash", "json", "text", "mermaid", "yaml"}, f"{page}: {languages}"


def test_each_include_is_on_a_page() -> None:
    included = {name for page in PAGES for name in INCLUDE.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert included == {path.name for path in INCLUDES.iterdir()}


@pytest.mark.parametrize("page", sorted({*PAGES, *OUTSIDE_THE_SITE, ".github/workflows/ci.yml"}))
def test_make_targets_in_the_pages_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"^(?:\$ |.* run: )?make ([a-z][a-z-]*)", text, re.M)) | set(
        re.findall(r"`make ([a-z-]+)", text)
    )
    assert named <= targets, f"{page}: no such target: {sorted(named - targets)}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", OUTSIDE_THE_SITE)
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    """Links of pages outside the site lead to files and anchors that exist. mkdocs checks the site's own pages in its
    strict build."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue  # an address
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_versions_are_rows_of_the_matrix_without_a_failure_of_ours() -> None:
    page = VERSIONS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| 3\.\d+ \|", page, re.M)
    assert rows
    assert set(rows) <= set(ROWS)
    assert set(re.findall(r"\d+ / \d+ / (\d+) (?=\|)", page)) == {"0"}
