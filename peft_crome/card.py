"""The part of a model card that a CROME adapter cannot do without: PEFT alone does not know the method."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HEADING = "## How to load this adapter"


def add_usage(save_directory: str, config: Any) -> None:
    """Append the lines that load the adapter to the directory's README.md, once; make the file if there is none."""
    path = Path(save_directory) / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\ntags:\n- crome\n---\n"
    if HEADING in card:
        return
    base = config.base_model_name_or_path or "<the base model>"
    usage = f"""
{HEADING}

This is a CROME adapter (arXiv 2408.06610). PEFT learns the method from `import peft_crome`
(package `peft-crome`); without that line loading fails with `KeyError: 'CROME'`.

```python
import peft_crome
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "<this repository>")
```
"""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(card.rstrip("\n") + "\n" + usage, encoding="utf-8")
    os.replace(temporary, path)
