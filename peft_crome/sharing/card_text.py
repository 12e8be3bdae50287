"""The text of an adapter's model card: how to load it, what it is, what is known of its training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .card_details import CardDetails
from .stage_record import stage_table

IMPORT = "import peft_crome"
HEADING = "## How to load this adapter"
COMPOSITE = "crome_vlm"
THIS = "<this repository>"
ASK = """picture = {"type": "image", "image": Image.open("picture.png")}
question = [picture, {"type": "text", "text": "What is shown?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)"""
ANSWER = "output = model.generate(**inputs, max_new_tokens=32)\nprint(%s.decode(output[0], skip_special_tokens=True))"


def hub_name(name: Any) -> str | None:
    """A model's or data set's name on the Hub; None for a folder, or a class's name."""
    if not isinstance(name, str) or "/" not in name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_text(
    directory: Path, config: Any, details: CardDetails, where: str = THIS, subfolder: str | None = None
) -> str:
    """Everything below the title.

    Args:
        directory: holds the adapter's files.
        config: the adapter's configuration.
        where: the name to load it by.
        subfolder: of `where`, if it is in one.
    """
    files = directory / subfolder if subfolder and (directory / subfolder).is_dir() else directory
    record = config.trained_on or {}
    base = config.base_model_name_or_path or "<the base model>"
    lines = [
        f"A [CROME](https://arxiv.org/abs/2408.06610) adapter for `{base}`: gated bottlenecks where embeddings enter "
        "the language model. Every weight of the model itself stays as it is.",
        *(["", details.task] if details.task else []),
        *(["", f"![What this adapter does](picture{details.picture.suffix.lower()})"] if details.picture else []),
        "",
        HEADING,
        "",
        "PEFT learns the method from `import peft_crome` (package `peft-crome`); without that line loading fails with "
        "`KeyError: 'CROME'`.",
        "",
        "```python",
        _snippet(config, base, where, subfolder),
        "```",
        "",
        "## What it is",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _facts(files, config, record, base) if value),
    ]
    if details.datasets or details.results or details.record:
        lines += ["", "## Training and results", ""]
    if details.datasets:
        lines += [f"Data: {', '.join(f'`{name}`' for name in details.datasets)}.", ""]
    if details.results:
        lines += ["| data | split | metric | value |", "| --- | --- | --- | --- |"]
        for result in details.results:
            metric = result.metric_name or result.metric_type
            lines.append(
                f"| {result.dataset_name} | {result.dataset_split or ''} | {metric} | {result.metric_value} |"
            )
        lines.append("")
    if details.record:
        lines += stage_table(details.record)
    return "\n".join(lines).rstrip("\n")


def pipeline_tag(model_type: str | None) -> str | None:
    """What the Hub calls a host's task."""
    if model_type == COMPOSITE or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image-text-to-text"
    return "text-generation" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def _snippet(config: Any, base: str, where: str, subfolder: str | None) -> str:
    record = config.trained_on or {}
    model_type = record.get("model_type")
    arguments = [json.dumps(base, ensure_ascii=False)]
    revision = config.revision or record.get("revision")
    if revision and hub_name(base):
        arguments.append(f"revision={json.dumps(revision)}")
    source = ", ".join(arguments)  # the processor's as well
    quantization = record.get("quantization") or {}
    extra = []
    if quantization.get("quant_method") == "bitsandbytes" and model_type != COMPOSITE:
        settings = ", ".join(
            f"{key}={value!r}" for key, value in sorted(quantization.items()) if key != "quant_method"
        )
        arguments.append(f"quantization_config=BitsAndBytesConfig({settings})")
        extra = ["BitsAndBytesConfig"]
    load = ", ".join(arguments)
    place = json.dumps(where, ensure_ascii=False) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    attach = f"model = PeftModel.from_pretrained(model, {place})"
    if model_type == COMPOSITE:
        return "\n".join(
            [
                "from peft import PeftModel",
                "from PIL import Image",
                "from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor",
                "",
                f"model = CromeVLMForConditionalGeneration.from_pretrained({load})",
                attach,
                f"processor = CromeVLMProcessor.from_pretrained({source})",
                ASK,
                ANSWER % "processor.tokenizer",
            ]
        )
    head = ["import peft_crome  # tells PEFT the method", "from peft import PeftModel"]
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        names = ", ".join(sorted(["AutoModelForImageTextToText", "AutoProcessor", *extra]))
        return "\n".join(
            [
                *head,
                "from PIL import Image",
                f"from transformers import {names}",
                "",
                f"model = AutoModelForImageTextToText.from_pretrained({load})",
                attach,
                f"processor = AutoProcessor.from_pretrained({source})",
                ASK,
                ANSWER % "processor",
            ]
        )
    auto = "AutoModelForCausalLM" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "AutoModel"
    lines = [*head, f"from transformers import {', '.join(sorted([auto, 'AutoTokenizer', *extra]))}", ""]
    lines += [f"model = {auto}.from_pretrained({load})", attach]
    if auto == "AutoModelForCausalLM":
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({source})",
            'inputs = tokenizer("Hello", return_tensors="pt")',
            ANSWER % "tokenizer",
        ]
    return "\n".join(lines)


def _facts(directory: Path, config: Any, record: dict[str, Any], base: str) -> list[tuple[str, str]]:
    tower = record.get("tower") or {}
    quantization = record.get("quantization") or {}
    versions = record.get("versions") or {}
    revision = config.revision or record.get("revision")
    return [
        ("base model", f"`{base}`" + (f", revision `{revision}`" if revision else "") + _local(base)),
        ("architecture", record.get("model_type") or ""),
        ("vision tower", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sorted(tower.items()))),
        ("weights of the base", ", ".join(f"{k} {v}" for k, v in sorted(quantization.items())) or "not quantised"),
        ("size", _size(directory)),
        ("bottleneck", f"{config.bottleneck_dim} hidden features, {config.gate_activation}"),
        ("also trained", ", ".join(f"`{name}`" for name in config.modules_to_save or ())),
        ("trained with", ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))),
    ]


def _size(directory: Path) -> str:
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return ""
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 (no dict)
        count = sum(math.prod(tensor.get_shape()) for tensor in tensors)
        dtypes = sorted({tensor.get_dtype() for tensor in tensors})
    size = path.stat().st_size
    return (
        f"{count:,} weights, {f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'} ({', '.join(dtypes)})"
    )


def _local(base: str) -> str:
    return ", a folder of the machine that trained it" if Path(base).exists() else ""
