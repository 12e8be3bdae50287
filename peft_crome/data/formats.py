"""Convert LLaVA's conversations, chat messages, and tables of questions and answers to rows of one form."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

from ..utils.read_image import embedded_image
from ..utils.shorten import short
from .fields import TURNS, are_alike, is_a_list_of_media, media_fields, source_of, system_of, unread_content
from .image_paths import ImageFolders
from .media import FIELDS, NOUNS, kinds_of
from .placeholders import MARKS, Place, foreign_placeholder
from .references import MOST_OPTIONS, as_choice, as_texts, with_options
from .rows import Fault
from .turns import answer_text, first_of, place_by_others, read_turn, said_by

NAME_COLUMNS = "name its columns: --column question=NAME --column answer=NAME --column image=NAME"
COLUMNS = ("question", "answer", *FIELDS, "id", "options", "rejected")


def parse(
    row: Any,
    number: int,
    folders: ImageFolders,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> tuple[dict[str, Any] | None, list[Fault]]:
    """Read one row.

    Args:
        row: {"conversations": [{"from", "value"}], "image", "video" or "audio"} (LLaVA), {"messages": [{"role",
            "content"}], "images"}, {"prompt": messages, "completion": messages}, or a record whose fields `columns`
            names. A list of image files in "video" is the frames of one video. In a preference, "chosen" holds the
            answer if the turns end with a question, and "rejected" the worse answer.
        number: number of the row, which is its id if it has none.
        folders: folders that paths of files start from.
        columns: `COLUMNS` -> the record's fields.
        prompt: the question for records without one, such as captions.
    Returns:
        The row, {"id": text, "images": [path or {"bytes", "path"}], "videos": [the same, or {"frames": images}],
        "audio": [as images], "messages": [{"role", "content": [{"type": "image", "video" or "audio"} or {"type":
        "text", "text"}]}]}, or None if a fault is not fixed; and the faults. A row may also have "answers" (texts of
        several people), "options" (texts of a multiple choice) and "rejected" (a text).
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
    fields = media_fields(row)
    places: list[Place] = []
    for turn in row["turns"]:
        message, turn_places, wrong = read_turn(turn, fields, places)
        faults += wrong
        places += turn_places
        messages += [message] if message is not None else []
    media: dict[str, list[Any]] = {}
    for kind in dict.fromkeys([*fields, *(kind for kind, _ in places)]):
        turn_media = [medium for shown, medium in places if shown == kind]
        media[kind], wrong = _media(row, fields.get(kind, []), kind, turn_media, folders)
        faults = wrong + faults
    if columns is None:
        faults += unread_content(row, fields, any(media.values()))
    if faults:
        return None, faults
    for kind in reversed(FIELDS):  # handled last, so that images come first
        faults += _place(messages, kind, len(media[kind])) if kind in media else []
    foreign = [foreign_placeholder(message, bool(media.get("image"))) for message in messages]
    faults += [fault for fault in foreign if fault is not None]
    faults += [_empty(message["role"]) for message in messages if not _says(message["content"])]
    messages, wrong = _ordered(messages)
    faults += wrong
    if row.get("rejected") and said_by(row["turns"][-1])[0] == "user":
        faults.append(Fault("answer", "'rejected' answers the last turn, which has no 'chosen' answer. Add that one."))
    if any(not fault.fixed for fault in faults):
        return None, faults
    texts: dict[str, Any] = {
        "answers": as_texts(row.get("answers")),
        "options": as_texts(first_of(row, "options", "choices")),
        "rejected": answer_text(row.get("rejected")),
    }
    if wrong:  # turns are left out with the media that they show
        media = {kind: values[: kinds_of(messages).count(kind)] for kind, values in media.items()}
    shown = {field: media.get(kind, []) for kind, field in FIELDS.items()}
    parsed = {"id": row_name(row, number), **shown, "messages": messages}
    return parsed | {key: value for key, value in texts.items() if value}, faults


def row_name(row: Any, number: int) -> str:
    """Return a row's id as text, or its number if it has none."""
    name = row.get("id") if isinstance(row, Mapping) else None
    return str(number if name is None else name).encode(errors="backslashreplace").decode()


def turns_key(row: Mapping[str, Any]) -> str | None:
    """Return the key of a row's turns; None: it has none."""
    keys = [key for key in TURNS if row.get(key) is not None]
    return next((key for key in keys if row[key]), keys[0] if keys else None)


def _turns(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    key = turns_key(row)
    turns = _turns_of(row, key) if key is not None else None
    if not isinstance(turns, list) or not turns:
        found = f"no conversation in the fields {short(sorted(map(str, row)), 150)}"
        if key is not None:
            found = f"{key!r} is {short(turns)}; expected [{{'from': 'human', 'value': '...'}}, ...]"
        return {}, [Fault("row", f"{found}. If these rows are a table, {NAME_COLUMNS}.")]
    others = [other for other in TURNS if other != key and isinstance(row.get(other), list) and row[other]]
    for other in others:
        if list(map(said_by, _turns_of(row, other))) != list(map(said_by, turns)):
            return {}, [Fault("row", f"{key!r} and {other!r} hold different turns. Take one of them out.")]
    system, faults = system_of(row)
    if system is not None:
        system_messages = [what for role, what in map(said_by, turns) if role == "system"]
        turns = turns if system_messages else [{"role": "system", "content": system}, *turns]
        if system_messages not in ([], [system]):
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
    if said_by(turns[-1])[0] != "user" or not isinstance(chosen, Mapping | list | str) or not chosen:
        return turns
    if isinstance(chosen, str):
        chosen = {"role": "assistant", "content": chosen}
    return [*turns, *(chosen if isinstance(chosen, list) else [chosen])]


def _from_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], prompt: str | None
) -> tuple[dict[str, Any], list[Fault]]:
    absent = [field for field in columns.values() if field not in row]
    if absent:
        return {}, [Fault("row", f"no column {absent}; the columns are {short(sorted(map(str, row)), 150)}.")]
    question = row[columns["question"]] if "question" in columns else prompt
    answer = row[columns["answer"]]
    others = {field: row[columns[field]] for field in (*FIELDS, "id", "rejected") if field in columns}
    if isinstance(answer, list) and answer:  # ten people in VQA, five in captions
        others["answers"] = answer
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
        others["options"] = options
        question, answer = with_options(question, options), letter
    if isinstance(answer, Number) and not isinstance(answer, bool):
        answer = str(answer)
    return {"turns": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **others}, []


def _most_frequent(answers: list[Any]) -> Any:
    texts = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    return max(texts, key=texts.count)


def _media(
    row: Mapping[str, Any], fields: list[str], kind: str, places: list[Any], folders: ImageFolders
) -> tuple[list[Any], list[Fault]]:
    """Order the media of a kind as the turns show them; media of the row that no turn shows come last."""
    row_media, faults = _row_media(row, fields, kind)
    rest = iter([_medium(medium, kind, folders) for medium in row_media])
    shown = [_medium(medium, kind, folders) if medium is not None else next(rest, None) for medium in places]
    media = [medium for medium in [*shown, *rest] if medium is not None]  # `_place` counts them
    faults += [medium for medium in media if isinstance(medium, Fault)]
    return [medium for medium in media if not isinstance(medium, Fault)], faults


def _row_media(row: Mapping[str, Any], fields: list[str], kind: str) -> tuple[list[Any], list[Fault]]:
    """Return the media of the first field that has some. Another field may hold the same media, by file name."""
    lists = [row[key] if is_a_list_of_media(row[key], kind) else [row[key]] for key in fields]
    faults = [
        Fault("row", f"{fields[0]!r} and {key!r} hold different {NOUNS[kind]}s. Take one of them out.")
        for key, other in zip(fields[1:], lists[1:], strict=True)
        if not are_alike(lists[0], other)
    ]
    return (lists[0] if lists else []), faults


def _medium(value: Any, kind: str, folders: ImageFolders) -> Any:
    """Convert a file to its form in rows, or return its fault."""
    noun = NOUNS[kind]
    if kind == "video" and isinstance(value, Mapping) and value.get("frames"):  # the form in rows
        value = value["frames"]
    if isinstance(value, Mapping) and (source := source_of(value)) is not None:
        file = _medium(source, kind, folders)
        return file | {"path": value.get("path")} if isinstance(file, dict) else file
    if isinstance(value, str) and value:
        try:
            data = embedded_image(value)
        except ValueError as error:
            return Fault("unreadable", f"the {noun} {short(value)} cannot be read: {error}.")
        return folders.find(value, noun) if data is None else {"bytes": data, "path": None}
    if isinstance(value, bytes) and value:
        return {"bytes": value, "path": None}
    if kind == "video" and isinstance(value, list) and value:
        frames = [_medium(frame, "image", folders) for frame in value]
        return next((frame for frame in frames if isinstance(frame, Fault)), {"frames": frames})
    if kind == "image" and hasattr(value, "convert") and hasattr(value, "size"):  # a PIL image
        return value
    return Fault("path", f"the {noun} {short(str(value))} is none; expected a path, a list of paths, or bytes.")


def _place(messages: list[dict[str, Any]], kind: str, count: int) -> list[Fault]:
    """Put media without a placeholder before the first user's turn (LAMM); refuse other mismatches."""
    if kind == "image" and count and kind not in kinds_of(messages):
        place_by_others(messages, count)
    placed = kinds_of(messages).count(kind)
    if placed == count:
        return []
    mark, noun = MARKS[kind], NOUNS[kind]
    if placed:
        return [Fault("placeholder", f"{placed} {mark} and {count} {noun}s. Write one {mark} per {noun}.")]
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        return [Fault("placeholder", f"no turn is from 'human', so there is no place for its {count} {noun}s.")]
    first["content"][:0] = [{"type": kind} for _ in range(count)]
    return []


def _says(content: list[dict[str, Any]]) -> bool:
    for part in content:  # noqa: SIM110  # any() takes twice as long, and every turn of every row comes here
        if part["type"] != "text" or (part["text"] and not part["text"].isspace()):
            return True
    return False


def _empty(role: str) -> Fault:
    return Fault("empty", f"a turn from {role!r} is empty. Write what is said, or take the row out.")


def kept_turns(roles: list[str]) -> list[int]:
    """Return the turns to read: a system turn, then from the first question to the last answer; none without one."""
    first = 1 if roles[:1] == ["system"] else 0
    start = first + (roles[first : first + 1] == ["assistant"])
    answers = [number for number in range(start, len(roles)) if roles[number] == "assistant"]
    return [*range(first), *range(start, answers[-1] + 1)] if answers else []


def _ordered(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Fault]]:
    roles = [message["role"] for message in messages]
    kept = kept_turns(roles)
    if not kept:
        alone = "the only answer has no question before it."
        none = "no turn is from 'gpt' (an assistant), so there is nothing to learn."
        return messages, [Fault("answer", alone if "assistant" in roles else none)]
    faults = []
    if len(kept) <= kept[-1]:
        faults.append(Fault("order", "the first turn is an answer; it is left out.", fixed=True))
    if kept[-1] + 1 < len(roles):
        wrong = "the last turn is not an answer; what follows the last answer is left out."
        faults.append(Fault("order", wrong, fixed=True))
    dialogue_roles = [roles[number] for number in kept if roles[number] != "system" or number > 0]
    if dialogue_roles != ["user", "assistant"] * (len(dialogue_roles) // 2):
        wrong = f"roles out of order: {', '.join(dialogue_roles[:12])}. Expected user, assistant, in turn."
        faults.append(Fault("order", wrong))
    return [messages[number] for number in kept], faults
