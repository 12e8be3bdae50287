"""LLaVA's conversations, chat messages, and tables of questions and answers -> rows of one form."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

from .image_paths import ImageFolders
from .references import as_choice, as_texts, with_options
from .rows import Fault, is_unicode

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NOT_READ = ("video", "videos", "audio", "audios")  # nothing is trained without what its row is about
COLUMNS = ("question", "answer", "image", "id", "options")


def parse(
    row: Any,
    number: int,
    folders: ImageFolders,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> tuple[dict[str, Any] | None, list[Fault]]:
    """Read one row.

    Args:
        row: {"conversations": [{"from", "value"}], "image"} (LLaVA), {"messages": [{"role", "content"}], "images"},
            {"prompt": messages, "completion": messages}, or a record whose fields `columns` names.
        number: of the row, its id where it has none.
        folders: that image paths start from.
        columns: {"question", "answer", "image", "id", "options"} -> the record's fields.
        prompt: the question of records without one, as of captions.
    Returns:
        The row, {"id": text, "images": [path or {"bytes", "path"}], "messages": [{"role", "content": [{"type":
        "image"} or {"type": "text", "text"}]}]}, or None where a fault is not mended; and the faults. A row that says
        them also has "answers", of several people, and "options", of a multiple choice: lists of text.
    """
    if isinstance(row, Fault):
        return None, [row]
    if not isinstance(row, Mapping):
        return None, [Fault("row", f"{type(row).__name__} instead of an object with 'conversations' or 'messages'.")]
    other = [key for key in NOT_READ if row.get(key)]
    if other and columns is None:
        return None, [Fault("row", f"{other} cannot be read; rows have text, and images in 'image' or 'images'.")]
    if columns is not None:
        row, faults = _from_columns(row, columns, prompt)
    else:
        row, faults = _turns(row)
    if faults:
        return None, faults
    images, faults = _images(row, folders)
    messages: list[dict[str, Any]] = []
    for turn in row["turns"]:
        message, own, wrong = _message(turn)
        faults += wrong
        for image in own:
            found = _image(image, folders)
            if isinstance(found, Fault):
                faults.append(found)
            else:
                images.append(found)
        messages += [message] if message is not None else []
    if faults:
        return None, faults
    faults += _place_images(messages, len(images))
    faults += [_empty(message["role"]) for message in messages if not _says(message["content"])]
    messages, wrong = _ordered(messages)
    faults += wrong
    if any(not fault.mended for fault in faults):
        return None, faults
    said = {"answers": as_texts(row.get("answers")), "options": as_texts(row.get("options", row.get("choices")))}
    images = images[: sum(map(_shown, messages))] if wrong else images  # those of turns that are left out
    parsed = {"id": row_name(row, number), "images": images, "messages": messages}
    return parsed | {key: texts for key, texts in said.items() if texts}, faults


def row_name(row: Any, number: int) -> str:
    """A row's id as text; its number where it has none."""
    name = row.get("id") if isinstance(row, Mapping) else None
    return str(number if name is None else name).encode(errors="backslashreplace").decode()


def turns_key(row: Mapping[str, Any]) -> str | None:
    """Where a row's turns are; None: it has none."""
    return next((key for key in ("conversations", "messages", "prompt") if row.get(key) is not None), None)


def _turns(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    key = turns_key(row)
    turns = row.get(key) if key is not None else None
    if key == "prompt" and isinstance(turns, list) and isinstance(row.get("completion"), list):
        turns = [*turns, *row["completion"]]
    if not isinstance(turns, list) or not turns:
        if key is None:
            key, turns = "conversations", None
        given = f"{key!r} is {turns!r}" if turns is None or len(repr(turns)) < 80 else f"{key!r} is no list"
        expected = "[{'from': 'human', 'value': '...'}, ...]; a table needs its columns named"
        return {}, [Fault("row", f"{given}; expected {expected}; the row has {sorted(map(str, row))}.")]
    return {**row, "turns": turns}, []


def _from_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], prompt: str | None
) -> tuple[dict[str, Any], list[Fault]]:
    absent = [field for field in columns.values() if field not in row]
    if absent:
        return {}, [Fault("row", f"no column {absent}; there are {sorted(map(str, row))}.")]
    question = row[columns["question"]] if "question" in columns else prompt
    answer = row[columns["answer"]]
    said: dict[str, Any] = {}
    if isinstance(answer, list) and answer:  # VQA's ten people, captions' five
        said["answers"] = answer
        answer = _most_frequent(answer)
    if "options" in columns:
        options = as_texts(row[columns["options"]])
        letter = as_choice(answer, options)
        if letter is None or not isinstance(question, str):
            wrong = f"the answer {answer!r} is none of the options {row[columns['options']]!r}"
            return {}, [Fault("answer", f"{wrong}; expected its number from 0, its letter, or its text.")]
        said["options"] = options
        question, answer = with_options(question, options), letter
    if isinstance(answer, Number) and not isinstance(answer, bool):
        answer = str(answer)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    image = row[columns["image"]] if "image" in columns else None
    made = {"turns": turns, "image": image, **said}
    return made | ({"id": row[columns["id"]]} if "id" in columns else {}), []


def _most_frequent(answers: list[Any]) -> Any:
    texts = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    return max(texts, key=texts.count)


def _images(row: Mapping[str, Any], folders: ImageFolders) -> tuple[list[Any], list[Fault]]:
    key = "image" if row.get("image") is not None else "images"
    given = row.get(key)
    given = [] if given is None or given == "" else given if isinstance(given, list) else [given]
    found = [_image(image, folders) for image in given]
    faults = [image for image in found if isinstance(image, Fault)]
    return [image for image in found if not isinstance(image, Fault)], faults


def _image(image: Any, folders: ImageFolders) -> Any:
    if isinstance(image, str) and image:
        return folders.find(image)
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        return {"bytes": image["bytes"], "path": image.get("path")}
    if isinstance(image, Mapping) and isinstance(image.get("path"), str) and image["path"]:
        return folders.find(image["path"])
    if hasattr(image, "convert") and hasattr(image, "size"):  # PIL's
        return image
    return Fault("path", f"the image {str(image)[:80]!r} is none; expected a path, a list of paths, or bytes.")


def _message(turn: Any) -> tuple[dict[str, Any] | None, list[Any], list[Fault]]:
    """A turn as a message, the images that it holds itself, and what is wrong with it."""
    given = turn if isinstance(turn, dict) else {}
    said = given.get("from", given.get("role"))
    role = ROLES.get(said) if isinstance(said, str) else None
    value = given.get("value", given.get("content"))
    if role is None or not isinstance(value, str | list):
        expected = "{'from': 'human' or 'gpt', 'value': text} or {'role': 'user' or 'assistant', 'content': ...}"
        return None, [], [Fault("turn", f"{str(turn)[:120]} is no turn; expected {expected}.")]
    images: list[Any] = []
    if isinstance(value, str):
        if not is_unicode(value):
            return None, [], [_half_a_character(turn)]
        shows = PLACEHOLDER in value
        content = _split(value) if role == "user" else [{"type": "text", "text": value}]
    else:
        found = _parts(value, role)
        if isinstance(found, Fault):
            return None, [], [found]
        content, images, shows = found
        if not all(is_unicode(part["text"]) for part in content if part["type"] == "text"):
            return None, [], [_half_a_character(turn)]
    if shows and role != "user":
        wrong = f"an image stands in a turn from {said!r}. Only the user's turns ('human') show images."
        return None, [], [Fault("placeholder", wrong)]
    return {"role": role, "content": content}, images, []


def _parts(value: list[Any], role: str) -> tuple[list[dict[str, Any]], list[Any], bool] | Fault:
    """A turn's parts, the images that they hold themselves, and whether they show any."""
    content: list[dict[str, Any]] = []
    images: list[Any] = []
    shows = False
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            content += _split(part["text"]) if role == "user" else [{"type": "text", "text": part["text"]}]
            shows = shows or PLACEHOLDER in part["text"]
        elif kind == "image":
            content.append({"type": "image"})
            images += [part[key] for key in ("image", "path", "url") if part.get(key) is not None][:1]
            shows = True
        else:
            expected = "{'type': 'text', 'text': ...} or {'type': 'image'}"
            return Fault("turn", f"{str(part)[:120]!a} is no part of a turn; expected {expected}.")
    return content, images, shows


def _half_a_character(turn: Any) -> Fault:
    return Fault("turn", f"{str(turn)[:120]!a} holds half a character (a lone surrogate). Mend the text.")


def _split(text: str) -> list[dict[str, Any]]:
    if PLACEHOLDER not in text:
        text = text.strip()
        return [{"type": "text", "text": text}] if text else []
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return content


def _place_images(messages: list[dict[str, Any]], given: int) -> list[Fault]:
    """Put pictures without a placeholder before the first user's turn (LAMM); refuse other numbers."""
    placed = sum(map(_shown, messages))
    if placed == given:
        return []
    if placed:
        wrong = f"{placed} {PLACEHOLDER} and {given} images. Write one {PLACEHOLDER} per image."
        return [Fault("placeholder", wrong)]
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        return [Fault("placeholder", f"no turn is from 'human', so there is no place for its {given} images.")]
    first["content"][:0] = [{"type": "image"}] * given
    return []


def _shown(message: dict[str, Any]) -> int:
    """How many images a message has."""
    return [part["type"] for part in message["content"]].count("image")


def _says(content: list[dict[str, Any]]) -> bool:
    for part in content:  # noqa: SIM110  # any() takes twice as long, and every turn of every row comes here
        if part["type"] == "image" or (part["text"] and not part["text"].isspace()):
            return True
    return False


def _empty(role: str) -> Fault:
    return Fault("empty", f"a turn from {role!r} is empty. Write what is said, or take the row out.")


def kept_turns(roles: list[str]) -> list[int]:
    """Which turns are read: a system turn, then from the first question to the last answer; none without an answer."""
    first = 1 if roles[:1] == ["system"] else 0
    start = first + (roles[first : first + 1] == ["assistant"])
    answers = [number for number in range(start, len(roles)) if roles[number] == "assistant"]
    return [*range(first), *range(start, answers[-1] + 1)] if answers else []


def _ordered(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Fault]]:
    roles = [message["role"] for message in messages]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if said and said == ["user", "assistant"] * (len(said) // 2):
        return messages, []
    kept = kept_turns(roles)
    if not kept:
        alone = "the only answer has no question before it."
        none = "no turn is from 'gpt' (an assistant), so there is nothing to learn."
        return messages, [Fault("answer", alone if "assistant" in roles else none)]
    faults = []
    if len(kept) <= kept[-1]:
        faults.append(Fault("order", "the first turn is an answer; it is left out.", mended=True))
    if kept[-1] + 1 < len(roles):
        wrong = "the last turn is no answer; what follows the last one is left out."
        faults.append(Fault("order", wrong, mended=True))
    said = [roles[number] for number in kept if roles[number] != "system" or number > 0]
    if said != ["user", "assistant"] * (len(said) // 2):
        wrong = f"roles out of order: {', '.join(said[:12])}. Expected user, assistant, in turn."
        faults.append(Fault("order", wrong))
    return [messages[number] for number in kept], faults
