"""Chat templates for language models that bring none."""

from __future__ import annotations

# Vicuna 1.1 and 1.5: one line, "USER: ... ASSISTANT: ...</s>".
VICUNA = (
    "{{ bos_token or '' }}"
    "{% set first = messages[0] if messages[0]['role'] == 'system' else none %}"
    "{{ first['content'] if first else 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }} "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} {% endif %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token or '' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# The words alone, as InstructBLIP's decoder-only models read them.
PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}"
    "{% if not loop.last %} {% endif %}{% endfor %}"
)
# The words and the token that ends them, as T5's encoder reads them.
T5 = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token or '' }}{% endif %}"
)

CHAT_TEMPLATES = {"vicuna": VICUNA, "plain": PLAIN, "t5": T5}
