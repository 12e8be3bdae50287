"""Test that answers are found in few renderings, and are those that rendering each of them finds."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_crome.data import CHAT_TEMPLATES, ConversationCollator, RowError
from peft_crome.data.answer_spans import CLOSE, FEW, OPEN, PromptRewritten, turn, writes_turns_alone
from peft_crome.data.expansion import tokens_in
from peft_crome.data.processed import Tokens
from tests.data.test_collator import CHATML, FORGETS, THINKS

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|h|>' + message['role'] + "
    "'<|/h|>\n\n'+ message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
QWEN25 = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}{% for message in messages %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% elif message.role == 'tool' %}"
    "{% if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}<|im_start|>user{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|h|>system<|/h|>\n\n" + date_string + system_message + "<|eot|>" }}
{%- if not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {{- first_user_message }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '<|/h|>\n\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|h|>assistant<|/h|>\n\n' }}
{%- endif %}
"""
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- generation -%}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALONE = {
    "chatml": CHATML, "vicuna": CHAT_TEMPLATES["vicuna"], "plain": CHAT_TEMPLATES["plain"],
    "llama 3": LLAMA3, "llama 3.2": LLAMA32, "generation": GENERATION,
    "zephyr": ZEPHYR, "qwen 2.5": QWEN25, "mistral": MISTRAL, "gemma": GEMMA, "llama 2": LLAMA2,
    "trimmed chatml": CHATML.replace("m['content']", "m['content'] | trim"),
    "left line ends off": CHATML.replace("m['content']", "m['content'].lstrip('\n')"),
    "trimmed plain": CHAT_TEMPLATES["plain"].replace("message['content']", "message['content'] | trim"),
    "no ends": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "thinking left out": CHATML.replace("m['content']", "m['content'].split('red')[-1]"),
    "a namespace": "{% set ns = namespace(first=true) %}" + CHATML.replace(
        "{{", "{% if ns.first %}<s>{% set ns.first = false %}{% endif %}{{", 1
    ),
    "a macro for a turn": "{% macro say(m) %}{{ m['content'] | trim }}{% endmacro %}"
    + CHATML.replace("m['content']", "say(m)"),
    "generation in a macro": "{% macro say(m) %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endmacro %}"
    + CHATML.replace("m['content']", "say(m)"),
    "a preamble in a namespace": "{% set ns = namespace(text='') %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.text = messages[0]['content'] %}{% endif %}{{ ns.text }}" + CHATML,
    "numbers in a namespace": "{% set ns = namespace(n=0) %}" + CHATML.replace(
        "{{", "{% if m['role'] == 'user' %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endif %}{{", 1
    ),
}  # fmt: skip
ENDS = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHERS = {
    "by the last message": CHATML.replace(
        "assistant\n{% endif %}", "assistant\n{% if 'red' in messages[-1]['content'] %}<think>{% endif %}{% endif %}"
    ),
    "by its own question": CHATML.replace(ENDS, "").replace(
        "<|im_end|>\n",
        "<|im_end|>\n{% if add_generation_prompt and loop.last and 'red' in m['content'] %}!{% endif %}",
    ) + ENDS,
    "a preamble by the last": "{% if 'red' in messages[-1]['content'] %}!{% endif %}" + CHATML,
    "a preamble by the last, in a slice": "{% set last = messages[-1:] %}"
    "{% if 'red' in last[0]['content'] %}!{% endif %}" + CHATML,
    "a preamble by the last, of another name": "{% set all = messages or [] %}{% set messages = all %}"
    "{% if 'red' in all[-1]['content'] %}!{% endif %}" + CHATML,
    "a preamble by the last, by a filter": "{% if 'red' in (messages | last)['content'] %}!{% endif %}" + CHATML,
    "by how many there are": "{% if messages | length > 7 %}!{% endif %}" + CHATML,
    "a preamble by any": "{% for m in messages %}{% if 'red' in m['content'] %}!{% endif %}{% endfor %}" + CHATML,
    "by what came before": "{% set ns = namespace(seen=false) %}" + CHATML.replace(
        "{% endfor %}", "{% if 'red' in m['content'] %}{% set ns.seen = true %}{% endif %}{% endfor %}"
    ).replace("assistant\n{% endif %}", "assistant\n{% if ns.seen %}!{% endif %}{% endif %}"),
    "an end by what came before": "{% set ns = namespace(seen=false) %}" + CHATML.replace(
        "{% endfor %}", "{% if 'red' in m['content'] %}{% set ns.seen = true %}{% endif %}{% endfor %}"
    ) + "{% if ns.seen %}!{% endif %}",
    "by what the last has left": "{% set ns = namespace(last=false) %}" + CHATML.replace(
        "<|im_end|>",
        "{% if loop.last and add_generation_prompt %}{% set ns.last = true %}{% endif %}"
        "{{ '!' if ns.last and 'red' in m['content'] }}<|im_end|>",
    ),
    "an end in a macro": "{% set ns = namespace(seen=false) %}{% macro end() %}{{ '!' if ns.seen }}{% endmacro %}"
    + CHATML.replace(
        "{% endfor %}", "{% if 'red' in m['content'] %}{% set ns.seen = true %}{% endif %}{% endfor %}"
    ) + "{{ end() }}",
    "by the next": CHATML.replace(
        "<|im_end|>", "{{ '!' if loop.nextitem and 'red' in loop.nextitem['content'] }}<|im_end|>"
    ),
    "by a macro": "{% macro end(all) %}{{ '!' if 'red' in all[-1]['content'] }}{% endmacro %}"
    + CHATML + "{{ end(messages) }}",
    "earlier thinking left out": CHATML.replace(
        "m['content']", "(m['content'] if loop.last else m['content'].split('red')[-1])"
    ),
    "earlier words left out": "{% for m in messages %}{% set said = m['content'] %}{% if not loop.last %}"
    "{% set said = said.split('red')[-1] %}{% endif %}" + CHATML.partition("%}")[2].replace("m['content']", "said"),
}  # fmt: skip
IN_EXCHANGES = {  # turns are written alone, in ways that reading the template does not tell
    "selectattr": "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}" + CHATML,
    "by the turn before": CHATML.replace(
        "m['content']", "('again: ' if loop.previtem and 'red' in loop.previtem['content'] else '') + m['content']"
    ),
}  # fmt: skip
TRIED = {  # what tells is their rendering
    "forgets": FORGETS,
    "thinks": THINKS,
}

RENDERED_TWICE = ("plain", "trimmed plain")  # only white space stands before an answer

WHITE = st.sampled_from(["", " ", "\n", "\n\n", " \n", "\t"])
WORDS = [
    "yes", "red", "blue", "assistant", "assistant:", "<|im_end|>", "ASSISTANT:", "user: yes", "", f"a{OPEN}b", CLOSE,
    "is it red?", "<image>",
]  # fmt: skip
TEXT = st.builds("".join, st.tuples(WHITE, st.sampled_from(WORDS), WHITE))


def outcome(find: Any) -> Any:
    try:
        return find()
    except PromptRewritten as error:
        return error.prompt


@pytest.mark.parametrize("few", [0, FEW])
@pytest.mark.parametrize("name", [*ALONE, *OTHERS, *IN_EXCHANGES, *TRIED])
@given(said=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), system=st.none() | TEXT)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_that_rendering_each_finds(
    name: str,
    few: int,
    said: list[tuple[str, str]],
    system: str | None,
    byte_processor: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft_crome.data.answer_spans.FEW", few)
    byte_processor.chat_template = (ALONE | OTHERS | IN_EXCHANGES | TRIED)[name]
    collator = ConversationCollator(byte_processor)
    spans = collator.template._spans
    messages = [turn("system", system)] if system is not None and name != "mistral" else []
    messages += [turn(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)]
    text = collator.template.render(messages)
    ends = [end for end, message in enumerate(messages) if message["role"] == "assistant"]
    expected = outcome(lambda: [spans.by_prefix(messages, end, text) for end in ends])
    found = outcome(lambda: spans.find(messages, text, earlier=True))
    assert found == expected or (isinstance(found, str) and isinstance(expected, str))
    if isinstance(expected, list) and all(start < stop for start, stop in expected):
        made = byte_processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = Tokens(text, made["input_ids"], made["offset_mapping"])
        assert tokens_in(tokens, found) == [
            number
            for number, (first, last) in enumerate(tokens.offsets)
            if any(start < last and first < stop for start, stop in expected)
        ]


def conversation(answers: int) -> dict[str, Any]:
    messages = [turn("system", "Be brief.")]
    for number in range(answers):
        messages += [turn("user", f"question {number}?"), turn("assistant", f"answer {number}\n")]
    return {"id": "r", "images": [], "messages": messages}


@pytest.mark.parametrize("name", ALONE)
def test_few_renderings_find_all_answers(name: str, byte_processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_processor.chat_template = ALONE[name]
    collator = ConversationCollator(byte_processor)
    row = conversation(40)
    row["messages"] = row["messages"][1:]
    collator.encode(row)  # tries the template
    rendered = []
    render = type(byte_processor).apply_chat_template

    def count(*given: Any, **named: Any) -> Any:
        rendered.append(1)
        return render(*given, **named)

    monkeypatch.setattr(type(byte_processor), "apply_chat_template", count)
    encoded = collator.encode(row)
    assert len(rendered) == (2 if name in RENDERED_TWICE else 1)
    monkeypatch.undo()
    learned = byte_processor.tokenizer.decode([label for label in encoded["labels"] if label != -100])
    assert [f"answer {number}" in learned for number in range(40)] == [True] * 40
    assert "question" not in learned


@pytest.mark.parametrize("name", IN_EXCHANGES)
def test_the_time_for_many_answers_grows_with_their_number(
    name: str, byte_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_processor.chat_template = IN_EXCHANGES[name]
    collator = ConversationCollator(byte_processor)
    collator.encode(conversation(1))  # tries the template
    messages = []
    render = type(byte_processor).apply_chat_template

    def count(self: Any, given: Any, **named: Any) -> Any:
        messages.append(len(given))
        return render(self, given, **named)

    monkeypatch.setattr(type(byte_processor), "apply_chat_template", count)
    encoded = collator.encode(conversation(100))
    assert sum(messages) < 30 * 100  # rendering each with all before it takes 20,000
    monkeypatch.undo()
    learned = byte_processor.tokenizer.decode([label for label in encoded["labels"] if label != -100])
    assert [f"answer {number}" in learned for number in range(100)] == [True] * 100
    assert "question" not in learned


@pytest.mark.parametrize("number", [1, 5, 11])
def test_one_exchange_of_many_that_is_written_otherwise_is_an_error(number: int, byte_processor: Any) -> None:
    byte_processor.chat_template = OTHERS["by its own question"]
    collator = ConversationCollator(byte_processor)
    row = conversation(12)
    assert collator.encode(row)["labels"]
    row["messages"][1 + 2 * number] = turn("user", "is it red?")
    with pytest.raises(RowError, match="in another way once the answer follows"):
        collator.encode(row)


def test_contents_that_are_strings_give_the_same_tokens(byte_processor: Any) -> None:
    row = conversation(3)
    plain = [{"role": message["role"], "content": message["content"][0]["text"]} for message in row["messages"]]
    collator = ConversationCollator(byte_processor)
    assert collator.encode({**row, "messages": plain}) == collator.encode(row)


@pytest.mark.parametrize("name", OTHERS)
def test_templates_that_look_at_other_turns_are_known(name: str) -> None:
    assert not writes_turns_alone(OTHERS[name])


@pytest.mark.parametrize("name", ALONE)
def test_templates_that_look_at_a_turn_alone_are_known(name: str) -> None:
    assert writes_turns_alone(ALONE[name])
