"""The model card of a stage's directory: what was trained on what, with which schedule, and the code to run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import transformers
import yaml

from ...sharing.card_text import hub_name
from ...sharing.stage_record import stage_table
from ...version import __version__

DATA_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow")


def stage_card(record: dict[str, Any], composite: Any) -> str:
    """README.md of a stage's directory.

    Args:
        record: with the key "stages", all that led here.
        composite: the trained composite's configuration.
    """
    last = record["stages"][-1]
    bases = [composite.vision_model_name_or_path, composite.text_model_name_or_path]
    system = last["recipe"]["system"]
    system_turn = f'{{"role": "system", "content": {json.dumps(system)}}}, ' if system is not None else ""
    ask = [f"    {system_turn.rstrip()}"] if system_turn else []
    header = {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["crome", "peft", "vision-language"],
        # Folders and files are nothing to the Hub.
        "base_model": [base for base in dict.fromkeys(bases) if base and hub_name(base)],
        "base_model_relation": "adapter",
    }
    data = dict.fromkeys(item["path"] for stage in record["stages"] for item in stage["data"])
    if named := [path for path in data if hub_name(path) and Path(path).suffix not in DATA_FILES]:
        header["datasets"] = named
    read = "" if composite.is_encoder_decoder else ', inputs["input_ids"].shape[1] :'
    quantised = [
        ", quantised when loaded" if quantization else ""
        for quantization in (composite.vision_quantization_config, composite.text_quantization_config)
    ]
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# CROME: {composite.text_config.model_type} that sees, after stage `{last['stage']}`",
        "",
        "A frozen vision tower and a frozen language model, joined by what [CROME](https://arxiv.org/abs/2408.06610) "
        "trains. This repository holds all of it; the backbones come by their names:",
        "",
        f"- vision tower: `{bases[0] or 'stored here'}`{_revision(composite.vision_revision)}{_local(bases[0])}, "
        f"pictures of {' x '.join(map(str, composite.image_height_width))}{quantised[0]}",
        f"- language model: `{bases[1] or 'stored here'}`{_revision(composite.text_revision)}{_local(bases[1])}"
        f"{quantised[1]}",
        "",
        "## Use it",
        "",
        "```python",
        "import peft_crome, transformers",
        "",
        'answer = transformers.pipeline("image-text-to-text", model="<this repository or directory>")',
        f'messages = [{system_turn}{{"role": "user", "content": ['
        '{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What is shown?"}]}]',
        'print(answer(text=messages, max_new_tokens=32, return_full_text=False)[0]["generated_text"])',
        "```",
        "",
        "or step by step:",
        "",
        "```python",
        "from PIL import Image",
        "from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor",
        "",
        'repository = "<this repository or directory>"',
        "model = CromeVLMForConditionalGeneration.from_pretrained(repository)",
        "processor = CromeVLMProcessor.from_pretrained(repository)",
        'picture = {"type": "image", "image": Image.open("picture.png")}',
        'question = [picture, {"type": "text", "text": "What is shown?"}]',
        "messages = [",
        *ask,
        '    {"role": "user", "content": question},',
        "]",
        "inputs = processor.apply_chat_template(",
        '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ")",
        "output = model.generate(**inputs, max_new_tokens=32)",
        f"print(processor.tokenizer.decode(output[0{read}], skip_special_tokens=True))",
        "```",
        "",
        "## What was trained",
        "",
        *stage_table(record),
    ]
    lines += _scores(record["stages"])
    lines += [
        "",
        f"Trained with peft_crome {__version__}, peft {peft.__version__} and transformers {transformers.__version__}. "
        f"AdamW with betas {tuple(last['recipe']['training']['betas'])} and weight decay "
        f"{last['recipe']['training']['weight_decay']}. The recipes are in "
        "`crome_stage.json`. Not affiliated with the paper's authors.",
        "",
    ]
    return "\n".join(lines)


def _scores(stages: list[dict[str, Any]]) -> list[str]:
    """The last evaluation of each stage on each of its data sets."""
    rows = []
    for stage in stages:
        scores = stage.get("scores", [])  # a stage of an older release has none
        for found in [score for score in scores if score["step"] == scores[-1]["step"]]:
            error = f" ± {found['stderr']:.1%}" if found["stderr"] is not None else ""  # None: of one row
            value = f"{found['score']:.1%}{error}"
            cells = [stage["stage"], found["data"], found["metric"], value, f"{found['n']:,}", found["step"]]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    heading = [
        "",
        "Answers by free generation (± standard error):",
        "",
        "| stage | data | metric | score | rows | step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return [*heading, *rows] if rows else []


def _revision(revision: str | None) -> str:
    return f", revision `{revision}`" if revision else ""


def _local(base: str | None) -> str:
    return ", a folder of the machine that trained it" if base and Path(base).exists() else ""
