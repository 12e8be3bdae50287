"""Parts of the documentation that a command writes, each between two comments."""

from __future__ import annotations

from pathlib import Path


def rewrite(page: Path, begin: str, end: str, text: str, check: bool = False) -> bool:
    """Put a text between two comments of a page, as a whole or not at all.

    Args:
        page: UTF-8 file with both comments.
        begin: comment before the text.
        end: comment after it.
        text: Markdown.
        check: only compare, and leave the page as it is.
    Returns:
        Whether the page had another text.
    Raises:
        ValueError: the page lacks one of the comments.
    """
    before = page.read_text(encoding="utf-8")
    head, found, rest = before.partition(begin)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page.name} lacks {begin!r} or, after it, {end!r}. Write both where the text belongs.")
    after = "\n\n".join([head + begin, text.strip("\n"), end + tail])
    if after != before and not check:
        temporary = page.with_suffix(".tmp")
        temporary.write_text(after, encoding="utf-8")
        temporary.replace(page)
    return after != before
