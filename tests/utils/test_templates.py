"""Test that templates show values unchanged and that a table cell cannot break its table."""

import pytest
from jinja2 import UndefinedError

from peft_crome.utils.templates import cell, render

FOLDED = "sharing/templates/folded.md.jinja"


def test_values_are_no_templates_and_markdown_keeps_its_signs() -> None:
    name = "{{ 7 * 7 }}{% raw %} <b> & 'c'"
    assert render(FOLDED, name=name).startswith(f"# {name}, with a CROME adapter's")


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render(FOLDED)


def test_html_is_escaped() -> None:
    page = render(
        "inspection/page.html", title="<script>{{ 7 }}", version="", prompt=None, views=[], facts=[], gradient="",
        matrix_headings=[], matrices=[], dead="", silent="", shared=[], activity_headings=[], shown=[],
    )  # fmt: skip
    assert "<title>&lt;script&gt;{{ 7 }}</title>" in page


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.5, "0.5"),
        ("a|b", r"a\|b"),
        ("||", r"\|\|"),
        (r"a\|b", r"a\|b"),  # escaped already
        (r"a\\|b", r"a\\\|b"),  # a backslash that is escaped itself
        ("a\r\nb\nc", "a b c"),
    ],
)
def test_a_cell_ends_where_its_value_does(value: object, written: str) -> None:
    assert cell(value) == written
