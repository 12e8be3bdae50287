"""Fill in Jinja templates for user-facing texts: files of the package, with values that are never templates."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

PIPE = re.compile(r"(?<!\\)((?:\\\\)*)\|")  # a bar without an escaping backslash


def render(template: str, /, **values: Any) -> str:
    """Fill in a template. Values are escaped for HTML in `.html` files, and inserted unchanged in all others.

    Args:
        template: the file's path inside `peft_crome`, with slashes.
        values: all names in the template; a missing one is an error.
    """
    return _environment().get_template(template).render(values)


def cell(value: Any) -> str:
    r"""Escape a value for a cell of a Markdown table, which a bar or a line break would end.

    Example:
        >>> print(cell("a|b\nc"))
        a\|b c
    """
    return PIPE.sub(r"\1\\|", " ".join(str(value).splitlines()))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("peft_crome", "."), autoescape=select_autoescape(), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = cell
    return environment
