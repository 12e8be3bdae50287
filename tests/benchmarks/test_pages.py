"""Test that a command rewrites only its own part of a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pages import rewrite

BEGIN, END = "<!-- begin -->", "<!-- end -->"


def test_the_text_between_the_comments_alone_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{BEGIN}\n\nold\n\n{END}\n\nbelow\n")
    before = page.read_text()
    assert rewrite(page, BEGIN, END, "new\n", check=True)
    assert page.read_text() == before
    assert rewrite(page, BEGIN, END, "new\n")
    assert page.read_text() == before.replace("old", "new")
    assert not rewrite(page, BEGIN, END, "new")


@pytest.mark.parametrize("text", ["no comment", f"{BEGIN} alone", f"{END} before {BEGIN}"])
def test_a_page_without_the_comments_stays(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md lacks"):
        rewrite(page, BEGIN, END, "new")
    assert page.read_text() == text
