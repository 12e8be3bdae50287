"""The table of a recipe's keys in docs/stages.md is the one that the recipe's classes give.

`python -m tests.training.test_docs_of_recipes` writes it.
"""

import re
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from peft_crome.training import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "stages.md"
START, END = "<!-- keys -->\n", "<!-- end of keys -->"


def sections(kind: Any) -> list[type[BaseModel]]:
    """The classes of a recipe's section in an annotation."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [found for part in typing.get_args(kind) for found in sections(part)]


def rows(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        inner = sections(field.annotation)
        kind = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(field.annotation)).replace("|", "or")
        kind = re.sub(r"Annotated\[(\w+)(, \w+\(([^()]|\([^()]*\))*\))+\]", r"\1", kind)  # bounds are in the messages
        value = field.get_default(call_default_factory=True)
        default = "required" if value is PydanticUndefined else "" if inner else f"`{value!r}`"
        if inner:
            kind = "a list of sections" if "list" in kind else "a section"
        text = (field.description or "").replace("|", "or")
        lines.append(f"| `{prefix}{name}` | {kind} | {default} | {text} |")
        for section in inner:
            lines += rows(section, f"{prefix}{name}.")
    return lines


def table() -> str:
    return "\n".join(["| key | kind | default | |", "|---|---|---|---|", *rows()]) + "\n"


def test_keys_in_the_docs_are_those_of_the_recipe() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0] == table(), "run python -m tests.training.test_docs_of_recipes"


def test_every_key_that_does_not_explain_itself_has_a_description() -> None:
    plain = {
        "stage",
        "seed",
        "epochs",
        "max_steps",
        "mean",
        "std",
        "betas",
        "weight_decay",
        "warmup_steps",
        "backbones",
    }
    plain |= {
        "bottleneck_dim",
        "gate_activation",
        "dropout",
        "init_weights",
        "adapter",
        "images",
        "data",
        "mixture",
        "feature_cache",
        "evaluation",
        "training",
    }
    plain |= {"gradient_checkpointing", "logging_steps"}
    silent = {line.split("`")[1].split(".")[-1] for line in rows() if line.endswith("|  |")}
    assert silent <= plain


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf-8")
