"""Chat templates for language models without one.

- vicuna: Vicuna 1.1 and 1.5, one line, "USER: ... ASSISTANT: ...</s>".
- plain: only the words, as InstructBLIP's decoder-only models read them.
- t5: the words and the end token, as T5's encoder reads them.
- words: only the words, for a processor that inserts images itself, as Florence-2's does.
"""

from __future__ import annotations

from importlib.resources import files

_FOLDER = files(__package__) / "chat_templates"
# The files break lines only after tags. Without these breaks every Jinja environment renders the same text.
CHAT_TEMPLATES = {
    name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").replace("\n", "")
    for name in ("vicuna", "plain", "t5", "words")
}
