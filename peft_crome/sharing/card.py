"""Write an adapter's model card, or update it and keep a user's text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..utils.atomic import replaced
from .card_details import CardDetails
from .card_text import IMPORT, THIS, card_text, hub_name, pipeline_tag

# The part that this package writes; the digest shows whether somebody has edited it.
BEGIN = "<!-- written by peft_crome {digest}: text between this line and the last one is replaced when you save -->"
END = "<!-- end of what peft_crome wrote -->"
PART = re.compile(r"<!-- written by peft_crome (?P<digest>\w+):[^\n]*-->\n(?P<text>.*?)\n" + re.escape(END), re.S)
# Lines that PEFT and transformers add to the Hub's template; the last three are about a quantized model.
NOT_A_USER_S = re.compile(
    r"^(### Framework versions|- PEFT .*|This is the model card of a .* been pushed on the Hub.*"
    r"|## Training procedure|The following `bitsandbytes` .*|- \w+: .*)$"
)
# TRL's instructions for loading, which lack the import.
QUICK_START = re.compile(r"## Quick start\n+```python\n[^`]*pipeline\([^`]*```")
TRAINERS = ("generated_from_trainer",)  # tags of cards that transformers' and TRL's trainers write
PAGE = "README.md"

logger = logging.getLogger(__name__)
# Authors' details of adapters that this process has saved, by folder and by content of adapter_config.json.
_saved_details: dict[str, CardDetails] = {}


def write_card(
    save_directory: str | os.PathLike,
    config: Any,
    where: str = THIS,
    subfolder: str | None = None,
    page: Path | None = None,
) -> None:
    """Write or update README.md beside an adapter.

    Args:
        save_directory: folder with adapter_config.json and the weights.
        config: a `CromeConfig`.
        where: the name to load the adapter by.
        subfolder: subfolder of `where`, for an adapter that is not called "default".
        page: the file to write if it is not `save_directory`'s README.md.
    """
    directory = Path(save_directory)
    details: CardDetails = config._card or CardDetails()
    _saved_details.update(dict.fromkeys(_names(directory), details))
    path = page or directory / PAGE
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    _fill_in(card.data, config, details)
    if details.image is not None:
        copy = directory / f"example_image{details.image.suffix.lower()}"
        if not (copy.exists() and copy.samefile(details.image)):
            shutil.copyfile(details.image, copy)
    ours = card_text(directory, config, details, where, subfolder)
    part = f"{BEGIN.format(digest=_digest(ours))}\n{ours}\n{END}"
    match = PART.search(card.text)
    if match is not None and _digest(match["text"]) != match["digest"]:
        logger.warning(
            "%s: the part that peft_crome wrote has been edited by hand and is kept. To have it written anew, delete "
            "it with the comments around it.",
            path,
        )
    elif match is not None:
        card.text = card.text[: match.start()] + part + card.text[match.end() :]
    elif _is_template(card.text):
        base = config.base_model_name_or_path
        title = f"# CROME adapter{f' for {Path(base).name}' if base else ''}"
        # PEFT would add the last lines at the next save.
        card.text = f"\n{title}\n\n{part}\n\n### Framework versions\n\n- PEFT {peft.__version__}"
    elif QUICK_START.search(card.text):
        card.text = QUICK_START.sub(lambda _: part, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{part}\n"
    with replaced(path) as temporary:
        card.save(temporary)


def correct_card(
    folder: str | os.PathLike, where: str = THIS, subfolder: str | None = None, page: Path | None = None
) -> bool:
    """Put this package's part into README.md beside an adapter if a library has overwritten the card.

    transformers and TRL write their cards over the one from `save_pretrained`. A card in which a person has written
    the import is unchanged; all other text of any card stays as well.

    Args:
        folder: a folder that may contain a CROME adapter, or adapters in subfolders; other folders are not changed.
        where: the name to load the adapter by.
        subfolder: subfolder of `where` that `folder` is.
        page: the card if it is not `folder`'s README.md.
    Returns:
        Whether the card was written.
    """
    folder = Path(folder)
    path = page or folder / PAGE
    try:
        if not any(map(_is_adapter, (folder, *(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))))):
            return False  # most cards belong to other models, and are not read
        card = ModelCard.load(path) if path.is_file() else None
        adapter = _adapter_of(folder, card)
        if adapter is None:
            return False
        part = PART.search(card.text) if card is not None else None
        if card is not None and part is None and IMPORT in card.text:
            return False
        details = next((_saved_details[name] for name in _names(adapter) if name in _saved_details), None)
        if part is not None and details is None:  # saved by another process, which may have had details
            return False
        config = PeftConfig.from_pretrained(str(adapter))
        config._card = details or CardDetails()
        below = adapter.name if adapter != folder else None
        write_card(folder, config, where, "/".join(filter(None, (subfolder, below))) or None, path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        logger.warning("%s: the line `%s` could not be put into the model card (%s).", path, IMPORT, error)
        return False
    return True


def _adapter_of(folder: Path, card: ModelCard | None) -> Path | None:
    """Find the adapter's folder that a page is about: the page's, or the first below if a machine wrote the page."""
    if _is_adapter(folder):
        return folder
    if (folder / CONFIG_NAME).is_file() or card is None:
        return None
    by_machine = card.data.get("library_name") == "peft" or set(TRAINERS) & set(card.data.get("tags") or [])
    if not by_machine and not PART.search(card.text) and not _is_template(card.text):
        return None
    below = [path.parent for path in folder.glob(f"*/{CONFIG_NAME}") if _is_adapter(path.parent)]
    # Checkpoints are named by their steps, and the last one counts. Named adapters are in the order of saving.
    return min(below, key=lambda path: (-_step(path), (path / CONFIG_NAME).stat().st_mtime_ns), default=None)


def _is_adapter(folder: Path) -> bool:
    path = folder / CONFIG_NAME
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("peft_type") == "CROME"


def _step(folder: Path) -> int:
    name, _, step = folder.name.rpartition("-")
    return int(step) if name == "checkpoint" and step.isdigit() else 0


def _names(folder: Path) -> list[str]:
    """List the keys under which an adapter's folder is remembered."""
    path = folder / CONFIG_NAME
    return [str(folder.resolve()), *([_digest(path.read_text(encoding="utf-8"))] if path.is_file() else [])]


def _fill_in(data: ModelCardData, config: Any, details: CardDetails) -> None:
    """Fill in metadata that the Hub reads. A user's values stay; folders of this machine are removed."""
    base = hub_name(config.base_model_name_or_path)
    data.library_name = "peft"
    if base is not None:
        data.base_model = base
        data["base_model_relation"] = "adapter"
    elif isinstance(data.base_model, str) and hub_name(data.base_model) is None:
        data.base_model = None
    # PEFT's tag for the base may contain a folder's name, or the tuner's class.
    tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:adapter:")]
    tags += [f"base_model:adapter:{base}"] if base is not None else []
    data.tags = sorted({*tags, "crome", "peft"})
    data.pipeline_tag = data.pipeline_tag or pipeline_tag((config.trained_on or {}).get("model_type"))
    data.license = details.license or data.license
    data.language = details.language or data.language
    named = [name for name in details.datasets if hub_name(name)]
    if named:
        before = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
        data.datasets = list(dict.fromkeys([*before, *named]))
    if details.results:
        data.model_name = data.model_name or f"CROME adapter for {config.base_model_name_or_path or 'a model'}"
        data.eval_results = list(details.results)


def _is_template(text: str) -> bool:
    """Whether no line of a card was written by a person."""
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    lines = [line for line in text.splitlines() if line.strip() and line not in template]
    return all(map(NOT_A_USER_S.match, lines))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]
