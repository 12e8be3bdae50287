"""Shorten values in messages to a readable and recognizable length."""

from __future__ import annotations

import reprlib
from typing import Any

MOST = 80  # number of characters of a value

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MOST
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 30
_SHORT.maxlevel = 3


def short(value: Any, most: int = MOST) -> str:
    """Return `repr` of a value, with the middle left out if it is long.

    Args:
        most: number of characters; a nested value may take twice as many as a text.

    Example:
        >>> short("a.png"), short("iVBORw0KGgo" * 100_000, 30)
        ("'a.png'", "'iVBORw0KGgoi...oiVBORw0KGgo'")
    """
    text = _SHORT.repr(value) if not isinstance(value, bytes | bytearray | memoryview) else f"{len(value):,} bytes"
    return cut(text, most if isinstance(value, str) else 2 * most)


def cut(text: str, most: int = MOST) -> str:
    """Leave out the middle of a text that is longer than `most` characters.

    Example:
        >>> cut("a.png"), cut("a" * 1000 + ".png", 12)
        ('a.png', 'aaaa....png')
    """
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
