"""Test that training reads the same text as generation, for every form of a row, its parts and its white space."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from peft_crome.data import CHAT_TEMPLATES, ConversationCollator, load_rows, read_rows
from peft_crome.training import generate_answers
from tests.data.test_collator import CHATML, THINKS

TEMPLATES = {"chatml": CHATML, "vicuna": CHAT_TEMPLATES["vicuna"], "plain": CHAT_TEMPLATES["plain"]}


WHITE = st.sampled_from(["", " ", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\n| "])
WORDS = st.sampled_from(["Which one?", "A. red", "B. blue", "in", "is", "(", ")", "|x|"])
PIECE = st.builds("".join, st.tuples(WHITE, WORDS, WHITE))


@st.composite
def turns_of_user(draw: Any, parts: bool) -> tuple[Any, int]:
    """Draw a user's turn, as text or in parts, and the number of images that it shows."""
    pieces = draw(st.lists(st.sampled_from(["image", "inside", "text"]), min_size=1, max_size=5))
    content: list[dict[str, str]] = []
    for kind in pieces:
        if kind == "image" and parts:
            content.append({"type": "image"})
        elif kind == "text":
            content.append({"type": "text", "text": draw(PIECE)})
        else:
            content.append({"type": "text", "text": draw(WHITE) + "<image>" + draw(WHITE)})
    shown = sum(part.get("text", "<image>").count("<image>") for part in content)
    return (content if parts else "".join(part["text"] for part in content)), shown


@st.composite
def conversations(draw: Any, parts: bool) -> tuple[list[dict[str, Any]], int]:
    messages: list[dict[str, Any]] = []
    images = 0
    if draw(st.booleans()):
        said = draw(PIECE)
        messages.append({"role": "system", "content": [{"type": "text", "text": said}] if parts else said})
    for _ in range(draw(st.integers(1, 3))):
        content, shown = draw(turns_of_user(parts))
        answer = draw(st.lists(PIECE, min_size=1, max_size=3))
        said = [{"type": "text", "text": piece} for piece in answer]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": said if parts else "".join(answer)})
        images += shown
    return messages, images


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def as_row(form: str, messages: list[dict[str, Any]], images: list[str]) -> dict[str, Any]:
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
        return {"image": images, "conversations": turns}
    if form == "prompt":
        return {"images": images, "prompt": messages[:-1], "completion": messages[-1:]}
    return {"images": images, "messages": messages}


def ids_of_inference(byte_processor: Any, messages: list[dict[str, Any]], image: Any, images: int) -> list[int]:
    given = {"images": [[image] * images]} if images else {}
    batch = byte_processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=given
    )
    return batch["input_ids"][0].tolist()


SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", ["conversations", "messages", "prompt"])
@pytest.mark.parametrize("parts", [False, True])
@given(data=st.data())
@SETTINGS
def test_training_reads_the_text_of_inference(
    form: str, parts: bool, template: str, data: Any, byte_processor: Any, tmp_path: Path
) -> None:
    byte_processor.chat_template = TEMPLATES[template]
    image = tmp_path / "a.png"
    if not image.exists():
        Image.new("RGB", (30, 30)).save(image)
    messages, images = data.draw(conversations(parts))
    (tmp_path / "rows.json").write_text(json.dumps([as_row(form, messages, [str(image)] * images)]))
    [row] = read_rows(tmp_path / "rows.json")
    expected = ids_of_inference(byte_processor, messages, str(image), images)
    assert ConversationCollator(byte_processor).encode(row)["input_ids"] == expected
    assert byte_processor.instruction(row["messages"]) == byte_processor.instruction(messages)
    assert ids_of_inference(byte_processor, row["messages"], str(image), images) == expected, "rows are conversations"


@given(question=PIECE, answer=PIECE, images=st.integers(0, 2))
@SETTINGS
def test_tables_keep_their_white_space(
    question: str, answer: str, images: int, byte_processor: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.png").touch()
    given = {"q": question, "a": answer, "image": [str(tmp_path / "a.png")] * images}
    (tmp_path / "rows.json").write_text(json.dumps([given]))
    [row] = read_rows(tmp_path / "rows.json", columns={"question": "q", "answer": "a", "image": "image"})
    asked = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    expected = byte_processor.apply_chat_template(
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    )
    expanded = expected.replace("<image>", "<image>" * byte_processor.image_seq_length)
    assert byte_processor.tokenizer.decode(ConversationCollator(byte_processor).encode(row)["input_ids"]) == expanded


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([text("Which one?\n"), text("A. red\n"), text("B. blue")], "Which one?\nA. red\nB. blue"),
        ("in <image> is", "in <image> is"),
        ("(<image>)", "(<image>)"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>\n<image>\nWhat?", "<image>\n<image>\nWhat?"),
        ("What?\r\n\r\n<image>", "What?\r\n\r\n<image>"),
        (" What?\n", " What?\n"),
        ([text("a\n|b|\n"), {"type": "image"}, text("c\n|d")], "a\n|b|\n<image>\nc\n|d"),
        ([{"type": "image"}, text("What?")], "<image>\nWhat?"),
        ([text("What is "), text("<image>?")], "What is \n<image>?"),
    ],
)
@pytest.mark.parametrize("read", [read_rows, load_rows], ids=["read", "loaded"])
def test_text_of_a_turn(read: Any, content: Any, expected: str, byte_processor: Any, tmp_path: Path) -> None:
    """A turn keeps its text when it is read, kept by `datasets`, and rendered with the chat template."""
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": " yes\n"}]
    shown = expected.count("<image>")
    (tmp_path / "rows.json").write_text(json.dumps([{"images": ["a.png"] * shown, "messages": messages}]))
    [row] = read(tmp_path / "rows.json")
    said = byte_processor.apply_chat_template(row["messages"])
    assert said == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n yes\n<|im_end|>\n"
    assert byte_processor.apply_chat_template(messages) == said
    shown_parts = [part["type"] for part in row["messages"][0]["content"]].count("image")
    assert shown_parts == shown == len(row["images"])


def test_evaluation_asks_with_the_text_of_the_row(
    composite: Any,
    byte_processor: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"role": "user", "content": [text(" in\t"), text("one \n")]}
    row = {"id": "r", "images": [], "messages": [asked, {"role": "assistant", "content": [text("a")]}]}
    seen: list[torch.Tensor] = []

    def generate(**batch: Any) -> torch.Tensor:
        seen.append(batch["input_ids"])
        return batch["input_ids"]

    monkeypatch.setattr(composite, "generate", generate)
    generate_answers(composite, byte_processor, [row], progress=False)
    expected = "<|im_start|>user\n in\tone \n<|im_end|>\n<|im_start|>assistant\n"
    assert byte_processor.tokenizer.decode(seen[0][0]) == expected
    ids = ConversationCollator(byte_processor).encode(row)["input_ids"]
    assert ids[: seen[0].shape[1]] == seen[0][0].tolist()


@pytest.mark.parametrize("trims", [True, False])
@given(answer=PIECE)
@SETTINGS
def test_answers_after_prompts_of_their_own_are_as_the_template_writes_them(
    trims: bool, answer: str, byte_processor: Any
) -> None:
    """An answer is learned as the template writes it. Gemma 4's prompt is not the beginning of the conversation."""
    byte_processor.chat_template = THINKS if trims else THINKS.replace(" | trim", "")
    user = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    messages = [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    encoded = ConversationCollator(byte_processor).encode({"id": "r", "images": [], "messages": messages})
    learned = byte_processor.tokenizer.decode([label for label in encoded["labels"] if label != -100])
    assert learned == (answer.strip() if trims else answer) + "<|im_end|>"
    prompt = byte_processor.apply_chat_template([user], add_generation_prompt=True)
    assert byte_processor.tokenizer.decode(encoded["input_ids"]) == prompt + learned


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_s_file_reads_as_the_template(name: str) -> None:
    file = files("peft_crome.data") / "chat_templates" / f"{name}.jinja"
    turns = [{"role": role, "content": f"{role}'s\nwords"} for role in ("system", "user", "assistant", "user")]
    written = [
        render_jinja_template([messages], chat_template=template, add_generation_prompt=True, bos_token="<s>")[0]
        for template in (CHAT_TEMPLATES[name], file.read_text(encoding="utf-8"))
        for messages in (turns, turns[1:2])
    ]
    assert written[:2] == written[2:]
    assert "\n" not in CHAT_TEMPLATES[name]
