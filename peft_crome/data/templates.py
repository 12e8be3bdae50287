"""Chat templates for language models that bring none.

- vicuna: Vicuna 1.1 and 1.5, one line, "USER: ... ASSISTANT: ...</s>".
- plain: the words alone, as InstructBLIP's decoder-only models read them.
- t5: the words and the token that ends them, as T5's encoder reads them.
- words: the words alone, for a processor that puts images in by itself, as Florence-2's.
"""

from __future__ import annotations

from importlib.resources import files

_FOLDER = files(__package__) / "chat_templates"
# The files break lines after tags alone. Without the breaks a template reads the same in every Jinja environment.
CHAT_TEMPLATES = {
    name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").replace("\n", "")
    for name in ("vicuna", "plain", "t5", "words")
}
