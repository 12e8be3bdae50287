"""Make CROME one of PEFT's methods by extending its enum and tables. Only this module changes PEFT."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import peft.auto
from huggingface_hub import HfApi, RepoCard
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "CROME"
COMPOSITE = f"{__package__}.vlm.modeling_crome_vlm"


def extend_peft_type() -> None:
    """Add the member `PeftType.CROME`. Do nothing if PEFT has it already.

    PEFT has no plug-in point, and an enum with members cannot be subclassed. So the member is entered where `enum`
    keeps members: by name, by value, in order and, in some releases of Python, among the hashable values.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)  # type: ignore[attr-defined]
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)
    if hashable_values is not None:
        hashable_values.append(NAME)


def allow_import() -> None:
    """Let `AutoPeftModel` import the composite's class, like transformers' classes; idempotent.

    The allowlist keeps an adapter's file from importing an arbitrary package. Only this module, which is imported
    already, is added: a file that names another one, such as `__main__`, would run it.
    """
    listed = getattr(peft.auto, "get_default_import_allowlist", None)  # PEFT before 0.21.2 has no such list
    if listed is not None and COMPOSITE not in listed():
        peft.auto.get_default_import_allowlist = lambda: [*listed(), COMPOSITE]


def keep_card() -> None:
    """Keep the loading instructions in an adapter's card, whoever writes or uploads the card; idempotent.

    transformers' `push_to_hub`, its `Trainer` and TRL write their cards beside an adapter. They save by
    `RepoCard.save`, or upload by `HfApi.create_commit`, or by `HfApi.upload_folder`, which commits in another way
    if Xet is installed.
    """
    from transformers import PreTrainedModel

    save, commit, upload = RepoCard.save, HfApi.create_commit, HfApi.upload_folder
    if getattr(save, "keeps_card", False):
        return

    @functools.wraps(save)
    def save_and_correct(self: RepoCard, filepath: Any) -> None:
        from .sharing.card import PAGE, correct_card
        from .sharing.card_text import IMPORT

        save(self, filepath)
        path = Path(filepath)
        if path.name == PAGE and IMPORT not in self.content:
            correct_card(path.parent)

    @functools.wraps(commit)
    def commit_corrected(self: HfApi, repo_id: str, operations: Any, **kwargs: Any) -> Any:
        from .sharing.upload import correct_upload

        if kwargs.get("repo_type") in (None, "model"):
            operations = correct_upload(repo_id, operations)
        return commit(self, repo_id, operations, **kwargs)

    @functools.wraps(upload)
    def upload_corrected(self: HfApi, *, repo_id: str, folder_path: Any, **kwargs: Any) -> Any:
        from .sharing.upload import correct_folder

        if kwargs.get("repo_type") in (None, "model"):
            patterns = {name: kwargs.get(name) for name in ("allow_patterns", "ignore_patterns")}
            correct_folder(repo_id, folder_path, kwargs.get("path_in_repo"), **patterns)
        return upload(self, repo_id=repo_id, folder_path=folder_path, **kwargs)

    save_and_correct.keeps_card = True  # type: ignore[attr-defined]
    RepoCard.save = save_and_correct  # type: ignore[method-assign]
    _replace_methods({"create_commit": commit_corrected, "upload_folder": upload_corrected})
    # `Trainer` calls it if a card names PEFT, and so does the card of an integrated adapter.
    PreTrainedModel.create_or_update_model_card = lambda self, output_dir: _correct_card(output_dir)


def _replace_methods(methods: dict[str, Callable[..., Any]]) -> None:
    """Replace methods of `HfApi`, also where huggingface_hub or another importer has bound them."""
    new = {id(getattr(HfApi, name)): method for name, method in methods.items()}
    for name, method in methods.items():
        setattr(HfApi, name, method)
    for module in list(sys.modules.values()):
        for alias, value in list(getattr(module, "__dict__", {}).items()):
            if type(value) is MethodType and id(value.__func__) in new:
                setattr(module, alias, MethodType(new[id(value.__func__)], value.__self__))


def _correct_card(folder: Any) -> None:
    from .sharing.card import correct_card

    correct_card(folder)


def resize_under_adapters() -> None:
    """Let a vocabulary be resized under an adapter, which does not depend on its size; idempotent."""
    from transformers import PreTrainedModel

    resize = PreTrainedModel.resize_token_embeddings
    if getattr(resize, "knows_crome", False):
        return

    @functools.wraps(resize)
    def resize_without_sites(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .tuner.without_sites import without_sites

        with without_sites(self):
            return resize(self, *args, **kwargs)

    resize_without_sites.knows_crome = True  # type: ignore[attr-defined]
    PreTrainedModel.resize_token_embeddings = resize_without_sites


def register() -> None:
    """Register the method with PEFT; idempotent."""
    extend_peft_type()
    allow_import()
    keep_card()
    resize_under_adapters()
    if PeftType.CROME in PEFT_TYPE_TO_TUNER_MAPPING:  # type: ignore[attr-defined]
        return
    from .backbone.compat import check_before_loading
    from .tuner import CromeConfig, CromeModel
    from .tuner.attaching.checks import check_loaded

    check_before_loading(NAME, check_loaded)

    register_peft_method(name="crome", config_cls=CromeConfig, model_cls=CromeModel, is_mixed_compatible=False)
