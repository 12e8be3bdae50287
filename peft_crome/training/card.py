"""The model card of a stage's directory: what was trained on what, with which schedule, and the code to run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def stage_card(record: dict[str, Any], composite: Any) -> str:
    """README.md of a stage's directory.

    Args:
        record: with the key "stages", all that led here.
        composite: the trained composite's configuration.
    """
    last = record["stages"][-1]
    bases = [composite.vision_model_name_or_path, composite.text_model_name_or_path]
    system = last["recipe"]["system"]
    ask = [f'    {{"role": "system", "content": {json.dumps(system)}}},'] if system is not None else []
    header = {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["crome", "peft", "vision-language"],
        # Folders are nothing to the Hub.
        "base_model": [base for base in dict.fromkeys(bases) if base and not Path(base).exists()],
    }
    read = "" if composite.is_encoder_decoder else ', inputs["input_ids"].shape[1] :'
    quantised = ", quantised when loaded" if composite.text_quantization_config is not None else ""
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
        f"- vision tower: `{bases[0] or 'stored here'}`{_local(bases[0])}",
        f"- language model: `{bases[1] or 'stored here'}`{_local(bases[1])}{quantised}",
        "",
        "## Use it",
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
        "| stage | trained weights | data (rows) | rows per step | steps | learning rate | final loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in record["stages"]:
        trained = "<br>".join(f"{part}: {count:,}" for part, count in stage["trained"].items())
        data = "<br>".join(f"{item['path']} ({_rows(item['rows'])})" for item in stage["data"])
        training = stage["recipe"]["training"]
        loss = "-" if stage["losses"] == [] else f"{stage['losses'][-1][1]:.4f}"
        peak = f"{training['initial_learning_rate']:g} to {training['learning_rate']:g}"
        peak += "".join(f"<br>{part}: {value:g}" for part, value in training["learning_rates"].items())
        rate = f"{peak} in {training['warmup_steps']} steps, cosine to 0"
        cells = [stage["stage"], trained, data, training["batch_size"], stage["steps"], rate, loss]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        f"AdamW with betas {tuple(last['recipe']['training']['betas'])} and weight decay "
        f"{last['recipe']['training']['weight_decay']}. The recipes are in "
        "`crome_stage.json`. Not affiliated with the paper's authors.",
        "",
    ]
    return "\n".join(lines)


def _rows(count: int | None) -> str:
    return "streamed" if count is None else f"{count:,}"


def _local(base: str | None) -> str:
    return ", a folder of the machine that trained it" if base and Path(base).exists() else ""
