"""What a run is, and where its record lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LANGUAGE = "smollm2"  # of all measurements but one
Kind = Literal["host", "base", "sweep", "main", "examples", "sequence", "change"]
Records = dict["Run", dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run. It has one record, and names all that distinguishes the run from others.

    Attributes:
        kind: "host" aligns the model that all methods of a seed start from, "base" asks it untrained, "sweep" tries a
            learning rate on validation rows, "main" is a cell of the main table, "examples" has few training images,
            "sequence" learns all tasks one after another, "change" moves an adapter to a changed model.
        experiment: "<method>/<experiment>"; empty for a host.
        task: name of a task; empty for a host and a sequence.
        frozen: how the language model is frozen while the method trains.
        rate: learning rate of a sweep.
        examples: number of training images, if they are few.
    """

    kind: Kind
    experiment: str = ""
    task: str = ""
    seed: int = 0
    language: str = LANGUAGE
    frozen: str = "bfloat16"
    rate: float | None = None
    examples: int | None = None

    @property
    def name(self) -> str:
        """Name of the record's file, in the manner of PEFT's results: "lora--rank13-q-v--digits--seed0"."""
        parts = [self.experiment.replace("/", "--"), self.task, f"seed{self.seed}", self.language, self.frozen]
        parts += [f"rate{self.rate:g}"] if self.rate is not None else []
        parts += [f"{self.examples}images"] if self.examples is not None else []
        return "--".join(filter(None, parts))

    def file(self, results: Path) -> Path:
        """Return the path of the record."""
        return results / self.kind / f"{self.name}.json"


def projection_file(results: Path, language: str, seed: int) -> Path:
    """Return the path of a host's projection, which lies beside the records so that any machine can continue."""
    return results / "host" / f"seed{seed}--{language}.safetensors"


def read(results: Path) -> Records:
    """Read all records of a folder, by their runs."""
    found = (json.loads(file.read_text()) for file in sorted(results.glob("*/*.json")))
    return {Run(**record["run_info"]["run"]): record for record in found}
