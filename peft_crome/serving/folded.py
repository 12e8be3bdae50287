"""Write the checkpoint of a host with the text branch folded into the embedding table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper

from ..backbone.model import backbone_name, unwrapped
from ..tuner import CromeLayer, CromeWeights
from ..tuner.attaching.checks import is_of_another_method
from ..tuner.merging.fold import why_not_foldable
from ..utils.atomic import new_directory
from ..utils.templates import render
from ..vlm import CromeVLMForConditionalGeneration
from .host_files import text_folded, write_host

CROME_CLASSES = (CromeLayer, CromeWeights)


def fold(model: PeftModel, output_dir: str | Path, processor: Any = None, **kwargs: Any) -> None:
    """Write a regular transformers checkpoint of the host, or of a composite's language model.

    The text branch is a function of the token alone, so E' = adapter(E) is exact. A head that was tied to the table
    keeps the old one. The checkpoint lacks the vision branch (see `ImageEncoder`). The model is not changed.

    Args:
        model: a model with an active adapter.
        output_dir: a new directory, which appears when it is complete.
        processor: a processor or a tokenizer to save beside the weights.
        kwargs: arguments of `PreTrainedModel.save_pretrained`.
    Raises:
        FileExistsError: output_dir exists already.
        ValueError: nothing can be folded. Or the model has no CROME adapter, has another method's beside it, is
            merged, trains its table as well, or has a form that a checkpoint cannot hold.
    """
    output = Path(output_dir)
    if output.exists():
        raise FileExistsError(f"{output} exists already, and nothing was written. Name a new directory.")
    model = unwrapped(model, PeftModel)
    host = unwrapped(model)
    check_alone(model)
    tables = [m for m in model.modules() if isinstance(m, CromeLayer) and isinstance(m.table, torch.nn.Embedding)]
    if all("text" not in site.branches and why_not_foldable(site.table) for site in tables):
        raise ValueError(
            "There is nothing to fold: no branch of this adapter is on an embedding table, so the language model is "
            "served as it is. Give it the prompt_embeds of peft_crome.serving.ImageEncoder."
        )
    target = unwrapped(host.language_model) if isinstance(host, CromeVLMForConditionalGeneration) else host
    with text_folded(model, target, host), new_directory(output) as temporary:
        write_host(target, host, temporary, processor, **kwargs)
        card = render("sharing/templates/folded.md.jinja", name=backbone_name(target))
        (temporary / "README.md").write_text(card, encoding="utf-8")


def check_alone(model: PeftModel) -> None:
    """Refuse a model that a regular checkpoint and three matrices cannot represent.

    Raises:
        ValueError: the model has no CROME adapter, has another method's beside it, is merged, or trains more.
    """
    sites = [module for module in model.modules() if isinstance(module, CromeLayer)]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no adapter of CROME's. Load one: PeftModel.from_pretrained(...)."
        )
    if any(site.merged for site in sites):
        raise ValueError("The adapter is merged already. Write model.unmerge_adapter() first.")
    others = [name for name, m in model.get_base_model().named_modules() if is_of_another_method(m, CROME_CLASSES)]
    if others:
        raise ValueError(
            f"{others[:3]} ({len(others)} in all) carry adapters of another PEFT method, which are not part of an "
            "ordinary checkpoint. Merge these into the host before CROME is attached: merge_and_unload()."
        )
    trained = [name for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    if trained:
        raise ValueError(
            f"{trained} has a copy for each adapter (modules_to_save or trainable_token_indices), and a checkpoint "
            "has one. Train without these, or serve the adapter attached, with transformers."
        )
