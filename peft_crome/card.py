"""An adapter's model card: written where there is none, brought up to date where there is, a user's text kept."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME

from .card_details import CardDetails
from .card_text import THIS, card_text, hub_name, pipeline_tag

# The part that is ours; the digest tells whether somebody has edited it.
BEGIN = "<!-- written by peft_crome {digest}: text between this line and the last one is replaced when you save -->"
END = "<!-- end of what peft_crome wrote -->"
PART = re.compile(r"<!-- written by peft_crome (?P<digest>\w+):[^\n]*-->\n(?P<text>.*?)\n" + re.escape(END), re.S)
# What PEFT and transformers add to the Hub's template by themselves.
NOT_A_USER_S = re.compile(
    r"^(### Framework versions|- PEFT .*|This is the model card of a .* been pushed on the Hub.*)$"
)
QUANTISATION = re.compile(r"^(## Training procedure|The following `bitsandbytes` .*|- \w+: .*)$")

logger = logging.getLogger(__name__)


def write_card(
    save_directory: str | os.PathLike, config: Any, where: str = THIS, subfolder: str | None = None
) -> None:
    """Write or update README.md beside an adapter.

    Args:
        save_directory: holds adapter_config.json and the weights.
        config: a `CromeConfig`.
        where: the name to load the adapter by.
        subfolder: of `where`, for an adapter that is not called "default".
    """
    directory = Path(save_directory)
    details: CardDetails = config._card or CardDetails()
    path = directory / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    _fill_in(card.data, config, details)
    if details.picture is not None:
        copy = directory / f"picture{details.picture.suffix.lower()}"
        if not (copy.exists() and copy.samefile(details.picture)):
            shutil.copyfile(details.picture, copy)
    ours = card_text(directory, config, details, where, subfolder)
    part = f"{BEGIN.format(digest=_digest(ours))}\n{ours}\n{END}"
    found = PART.search(card.text)
    if found is not None and _digest(found["text"]) != found["digest"]:
        logger.warning(
            "%s: the part that peft_crome wrote has been edited by hand and is kept. To have it written anew, delete "
            "it with the comments around it.",
            path,
        )
    elif found is not None:
        card.text = card.text[: found.start()] + part + card.text[found.end() :]
    elif _is_template(card.text):
        base = config.base_model_name_or_path
        title = f"# CROME adapter{f' for {Path(base).name}' if base else ''}"
        # The last lines are PEFT's, which it would add at the next save.
        card.text = f"\n{title}\n\n{part}\n\n### Framework versions\n\n- PEFT {peft.__version__}"
    else:
        card.text = f"{card.text.rstrip()}\n\n{part}\n"
    temporary = path.with_suffix(".tmp")
    card.save(temporary)
    os.replace(temporary, path)


def card_of_upload(working_dir: str | os.PathLike, repo_id: str, peft_config: dict[str, Any]) -> None:
    """Put the cards right before `push_to_hub` uploads a folder, where transformers has replaced them by its own.

    Args:
        peft_config: adapter name -> configuration, as a PEFT model has it.
    """
    root = Path(working_dir)
    named = {name: config for name, config in peft_config.items() if hasattr(type(config), "_card")}
    for name, config in named.items():
        subfolder = None if name == "default" else name
        folder = root / (subfolder or "")
        if (folder / CONFIG_NAME).is_file():
            write_card(folder, config, repo_id, subfolder)
    if named and not (root / CONFIG_NAME).is_file():  # the repository's own page: of the first of its adapters
        name, config = next(iter(named.items()))
        write_card(root, config, repo_id, name)


def _fill_in(data: ModelCardData, config: Any, details: CardDetails) -> None:
    """Metadata that the Hub reads; what a user wrote stays, folders of this machine go."""
    base = hub_name(config.base_model_name_or_path)
    data.library_name = "peft"
    if base is not None:
        data.base_model = base
        data["base_model_relation"] = "adapter"
    elif isinstance(data.base_model, str) and hub_name(data.base_model) is None:
        data.base_model = None
    # PEFT's tag for the base may hold a folder's name, or the tuner's class.
    tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:adapter:")]
    tags += [f"base_model:adapter:{base}"] if base is not None else []
    data.tags = sorted({*tags, "crome", "peft"})
    data.pipeline_tag = data.pipeline_tag or pipeline_tag((config.trained_on or {}).get("model_type"))
    data.license = details.license or data.license
    data.language = details.language or data.language
    named = [name for name in details.datasets if hub_name(name)]
    if named:
        data.datasets = list(dict.fromkeys([*_listed(data.datasets), *named]))
    if details.results:
        data.model_name = data.model_name or f"CROME adapter for {config.base_model_name_or_path or 'a model'}"
        data.eval_results = list(details.results)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_template(text: str) -> bool:
    """Whether a card has no line that a person wrote."""
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    own = [line for line in text.splitlines() if line.strip() and line not in template]
    return all(NOT_A_USER_S.match(line) or QUANTISATION.match(line) for line in own)


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]
