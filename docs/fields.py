"""A griffe extension for the API pages: a field's help text is its documentation.

Dataclasses hold it in `field(metadata={"help": ...})`, and pydantic models in `Field(description=...)`.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Gives an attribute without a docstring the help text of its field."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            arguments = {keyword.arg: keyword.value for keyword in node.value.keywords}
            if isinstance(metadata := arguments.get("metadata"), ast.Dict):
                names = [key and ast.literal_eval(key) for key in metadata.keys]
                arguments |= dict(zip(names, metadata.values, strict=True))
            text = arguments.get("help") or arguments.get("description")
            if text is not None:
                attr.docstring = griffe.Docstring(ast.literal_eval(text), parent=attr)
