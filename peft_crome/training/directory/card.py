"""Write the model card of a stage's directory: what was trained on what, the schedule, and the code to run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import transformers
import yaml

from ...sharing.card_text import hub_name, is_local
from ...utils.templates import render
from ...version import __version__

DATA_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow")


def stage_card(record: dict[str, Any], composite: Any) -> str:
    """Write README.md of a stage's directory.

    Args:
        record: record of the stage; its key "stages" lists all stages up to this one.
        composite: the trained composite's configuration.
    """
    bases = [composite.vision_model_name_or_path, composite.text_model_name_or_path]
    system = record["stages"][-1]["recipe"]["system"]
    header = {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["crome", "peft", "vision-language"],
        # The Hub does not know local folders and files.
        "base_model": [base for base in dict.fromkeys(bases) if base and hub_name(base)],
        "base_model_relation": "adapter",
    }
    data = dict.fromkeys(item["path"] for stage in record["stages"] for item in stage["data"])
    if named := [path for path in data if hub_name(path) and Path(path).suffix not in DATA_FILES]:
        header["datasets"] = named
    return render(
        "sharing/templates/stage.md.jinja",
        record=record,
        composite=composite,
        header=yaml.safe_dump(header, sort_keys=False),
        system=None if system is None else json.dumps(system),
        is_local=is_local,
        versions={"peft_crome": __version__, "peft": peft.__version__, "transformers": transformers.__version__},
    )
