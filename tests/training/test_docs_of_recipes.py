"""Test that the table of keys in docs/stages.md is the one that the recipe's classes give.

`python -m tests.training.test_docs_of_recipes` writes the table.
"""

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from peft_crome.training import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "stages.md"
START, END = "<!-- keys -->\n", "<!-- end of keys -->"


def sections(kind: Any) -> list[type[BaseModel]]:
    """Return the classes of a recipe's sections in an annotation."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [found for part in typing.get_args(kind) for found in sections(part)]


KINDS = {str: "text", bool: "true or false", int: "whole number", float: "number", dict: "mapping", Any: "any value"}


def kind_of(annotation: Any) -> str:
    """Describe the values that a key takes, in words for authors of YAML. Error messages give the bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(part) for part in inner if part is not type(None)))
    if origin is typing.Annotated:
        return kind_of(inner[0])
    if origin is tuple:
        return f"{len(inner)} numbers"
    if origin is list:
        return f"list of {kind_of(inner[0])}"
    return KINDS[origin or annotation]


def default_of(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(value)}`".replace('"', "") if value is not None else ""


def rows(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        inner = sections(field.annotation)
        if inner:
            kind = "sections" if "list" in str(field.annotation) else "section"
            default = "required" if field.is_required() else ""
        else:
            kind = kind_of(field.annotation)
            default = default_of(field.get_default(call_default_factory=True))
        lines.append(f"| `{prefix}{name}` | {kind} | {default} | {field.description} |")
        for section in inner:
            lines += rows(section, f"{prefix}{name}.")
    return lines


def table() -> str:
    return "\n".join(["| key | kind | default | |", "|---|---|---|---|", *rows()]) + "\n"


def test_keys_in_the_docs_are_those_of_the_recipe() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0] == table(), "run python -m tests.training.test_docs_of_recipes"


def test_every_key_has_a_description_in_whole_words() -> None:
    fields = {line: line.rsplit(" | ", 1)[1].removesuffix(" |") for line in rows()}
    assert [line for line, text in fields.items() if not text.endswith(".") or text.startswith(("Of ", "None"))] == []


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf-8")
