"""LLaVA's conversations, chat messages, and tables of questions and answers -> rows of one form."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

from ..utils.read_image import SOURCES, embedded_image
from ..utils.shorten import short
from .fields import TURNS, are_alike, image_fields, is_nothing, system_of, unread_content
from .image_paths import ImageFolders
from .placeholders import PLACEHOLDER, foreign_placeholder
from .references import MOST_OPTIONS, as_choice, as_texts, with_options
from .rows import Fault
from .turns import answer_text, first_of, place_by_others, read_turn, said_by

COLUMNS = ("question", "answer", "image", "id", "options", "rejected")


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
            {"prompt": messages, "completion": messages}, or a record whose fields `columns` names. Of a preference,
            "chosen" holds the answer where the turns end with a question, and "rejected" the other one.
        number: of the row, its id where it has none.
        folders: that image paths start from.
        columns: {"question", "answer", "image", "id", "options", "rejected"} -> the record's fields.
        prompt: the question of records without one, as of captions.
    Returns:
        The row, {"id": text, "images": [path or {"bytes", "path"}], "messages": [{"role", "content": [{"type":
        "image"} or {"type": "text", "text"}]}]}, or None where a fault is not mended; and the faults. A row that says
        them also has "answers", of several people, and "options", of a multiple choice: lists of text; and "rejected",
        a text.
    """
    if isinstance(row, Fault):
        return None, [row]
    if not isinstance(row, Mapping):
        return None, [Fault("row", f"{type(row).__name__} instead of an object with 'conversations' or 'messages'.")]
    if columns is not None:
        row, faults = _from_columns(row, columns, prompt)
    else:
        row, faults = _turns(row)
    if faults:
        return None, faults
    messages: list[dict[str, Any]] = []
    has_images = bool(image_fields(row))
    places: list[Any] = []  # each image that a turn shows: itself, or None for the next one of the row
    for turn in row["turns"]:
        message, own, wrong = read_turn(turn, places if has_images else None)
        faults += wrong
        places += own
        messages += [message] if message is not None else []
    images, wrong = _images(row, places, folders)
    faults = wrong + faults
    if columns is None:
        faults += unread_content(row, bool(images))
    if faults:
        return None, faults
    faults += _place_images(messages, len(images))
    foreign = [foreign_placeholder(message, bool(images)) for message in messages]
    faults += [fault for fault in foreign if fault is not None]
    faults += [_empty(message["role"]) for message in messages if not _says(message["content"])]
    messages, wrong = _ordered(messages)
    faults += wrong
    if any(not fault.mended for fault in faults):
        return None, faults
    said: dict[str, Any] = {
        "answers": as_texts(row.get("answers")),
        "options": as_texts(first_of(row, "options", "choices")),
        "rejected": answer_text(row.get("rejected")),
    }
    images = images[: sum(map(_shown, messages))] if wrong else images  # those of turns that are left out
    parsed = {"id": row_name(row, number), "images": images, "messages": messages}
    return parsed | {key: given for key, given in said.items() if given}, faults


def row_name(row: Any, number: int) -> str:
    """A row's id as text; its number where it has none."""
    name = row.get("id") if isinstance(row, Mapping) else None
    return str(number if name is None else name).encode(errors="backslashreplace").decode()


def turns_key(row: Mapping[str, Any]) -> str | None:
    """Where a row's turns are; None: it has none."""
    given = [key for key in TURNS if row.get(key) is not None]
    return next((key for key in given if row[key]), given[0] if given else None)


def _turns(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    key = turns_key(row)
    turns = _turns_of(row, key) if key is not None else None
    if not isinstance(turns, list) or not turns:
        given = f"{key or 'conversations'!r} is {short(turns)}"
        expected = "[{'from': 'human', 'value': '...'}, ...]; a table needs its columns named"
        return {}, [Fault("row", f"{given}; expected {expected}; the row has {short(sorted(map(str, row)), 150)}.")]
    others = [other for other in TURNS if other != key and isinstance(row.get(other), list) and row[other]]
    for other in others:
        if list(map(said_by, _turns_of(row, other))) != list(map(said_by, turns)):
            return {}, [Fault("row", f"{key!r} and {other!r} hold different turns. Take one of them out.")]
    system, faults = system_of(row)
    if system is not None:
        said = [what for role, what in map(said_by, turns) if role == "system"]
        turns = turns if said else [{"role": "system", "content": system}, *turns]
        if said not in ([], [system]):
            wrong = f"the row's system message {short(system)} is not that of its turns. Take one out."
            faults.append(Fault("row", wrong))
    return {**row, "turns": turns}, faults


def _turns_of(row: Mapping[str, Any], key: str) -> Any:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        return turns
    if key == "prompt" and isinstance(row.get("completion"), list):
        return [*turns, *row["completion"]]
    chosen = row.get("chosen")
    if said_by(turns[-1])[0] != "user" or not isinstance(chosen, Mapping | list):
        return turns
    return [*turns, *(chosen if isinstance(chosen, list) else [chosen])]


def _from_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], prompt: str | None
) -> tuple[dict[str, Any], list[Fault]]:
    absent = [field for field in columns.values() if field not in row]
    if absent:
        return {}, [Fault("row", f"no column {absent}; there are {short(sorted(map(str, row)), 150)}.")]
    question = row[columns["question"]] if "question" in columns else prompt
    answer = row[columns["answer"]]
    said: dict[str, Any] = {}
    if isinstance(answer, list) and answer:  # VQA's ten people, captions' five
        said["answers"] = answer
        answer = _most_frequent(answer)
    if "options" in columns:
        options = as_texts(row[columns["options"]])
        if len(options) > MOST_OPTIONS:
            wrong = f"{len(options)} options, and letters for {MOST_OPTIONS}. Take some out, or the row."
            return {}, [Fault("answer", wrong)]
        letter = as_choice(answer, options)
        if letter is None or not isinstance(question, str):
            wrong = f"the answer {short(answer)} is none of the options {short(row[columns['options']])}"
            return {}, [Fault("answer", f"{wrong}; expected its number from 0, its letter, or its text.")]
        said["options"] = options
        question, answer = with_options(question, options), letter
    if isinstance(answer, Number) and not isinstance(answer, bool):
        answer = str(answer)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if "rejected" in columns:
        said["rejected"] = row[columns["rejected"]]
    image = row[columns["image"]] if "image" in columns else None
    made = {"turns": turns, "image": image, **said}
    return made | ({"id": row[columns["id"]]} if "id" in columns else {}), []


def _most_frequent(answers: list[Any]) -> Any:
    texts = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    return max(texts, key=texts.count)


def _images(row: Mapping[str, Any], places: list[Any], folders: ImageFolders) -> tuple[list[Any], list[Fault]]:
    """The images in the order in which the turns show them; the row's own that none shows come last."""
    given, faults = _given_images(row)
    rest = iter([_image(image, folders) for image in given])
    shown = [_image(own, folders) if own is not None else next(rest, None) for own in places]
    found = [image for image in [*shown, *rest] if image is not None]  # `_place_images` counts them
    faults += [image for image in found if isinstance(image, Fault)]
    return [image for image in found if not isinstance(image, Fault)], faults


def _given_images(row: Mapping[str, Any]) -> tuple[list[Any], list[Fault]]:
    """The images of the first field that has some; another field may hold the same ones, by their names."""
    fields = image_fields(row)
    lists = [row[key] if isinstance(row[key], list) else [row[key]] for key in fields]
    faults = [
        Fault("row", f"{fields[0]!r} and {key!r} hold different images. Take one of them out.")
        for key, other in zip(fields[1:], lists[1:], strict=True)
        if not are_alike(lists[0], other)
    ]
    return (lists[0] if lists else []), faults


def _image(image: Any, folders: ImageFolders) -> Any:
    if isinstance(image, Mapping) and (sources := [image[key] for key in SOURCES if not is_nothing(image.get(key))]):
        found = _image(sources[0], folders)
        return found | {"path": image.get("path")} if isinstance(found, dict) else found
    if isinstance(image, str) and image:
        try:
            data = embedded_image(image)
        except ValueError as error:
            return Fault("unreadable", f"the image {short(image)} cannot be read: {error}.")
        return folders.find(image) if data is None else {"bytes": data, "path": None}
    if isinstance(image, bytes) and image:
        return {"bytes": image, "path": None}
    if hasattr(image, "convert") and hasattr(image, "size"):  # PIL's
        return image
    return Fault("path", f"the image {short(str(image))} is none; expected a path, a list of paths, or bytes.")


def _place_images(messages: list[dict[str, Any]], given: int) -> list[Fault]:
    """Put images without a placeholder before the first user's turn (LAMM); refuse other numbers."""
    if given and not any(map(_shown, messages)):
        place_by_others(messages, given)
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
