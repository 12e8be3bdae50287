"""Merge adapters: the text branch folds into its table, the others stay as modules. `fold.py` has the arithmetic."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ...backbone.model import embed_scale, original_module, text_config, unwrapped
from ...backbone.modes import evaluating
from .fold import folded_table, install_table, why_not_foldable

logger = logging.getLogger(__name__)

TIE = "tie_word_embeddings"
# model_type -> why a folded table would not reproduce the adapted model's output
NOT_MERGEABLE = {
    "diffusion_gemma": "also averages its table's rows, for self-conditioning, which the adapter leaves as they are",
}


class Mergeable(nn.Module, BaseTunerLayer):  # FSDP2 changes a layer's class, which needs this order
    """Merge, unmerge and unload a layer, as PEFT asks; `CromeLayer` has the rest."""

    base_layer: nn.Module
    _weights: tuple[Any]
    _unmerged: list[nn.Parameter]  # in a list: a merged model's state_dict has one table
    _surveyed: str | bool | None = False  # why the table does not fold; False: not examined since the last merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold a text branch into its embedding table. Another branch is not linear and stays a module.

        Raises:
            ValueError: safe_merge is set and the new table has non-finite values.
        """
        names = self._attached(check_adapters_to_merge(self, adapter_names))
        table = self.table
        if not names:
            return
        surveyed, self._surveyed = self._surveyed, False
        if why_not_foldable(table) if surveyed is False else surveyed:
            self.merged_adapters.extend(names)
            return
        folded = self.folded_table([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(folded).all():
            broken = ", ".join(names)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken.")
        self._unmerged = self._unmerged or [table.weight]
        install_table(table, folded)
        self.merged_adapters.extend(names)

    def folded_table(self, names: list[str]) -> torch.Tensor:
        """Compute the embedding table with adapters folded in, without installing it.

        Returns:
            (vocabulary, d), a new tensor.
        """
        table = self.table
        merged = table.weight
        table.weight = merged if self.unmerged_table is None else self.unmerged_table
        try:
            with evaluating(self._weights[0]):  # dropout must not be folded in
                return folded_table(table, lambda rows, ids: self.adapt(rows, names, ids))
        finally:
            table.weight = merged

    def unmerge(self) -> None:
        """Restore the table from before the first merge. It is exact, since that table was kept."""
        if self.unmerged_table is not None:
            now = self.table.weight
            self.unmerged_table.data = self.unmerged_table.data.to(device=now.device, dtype=now.dtype)
            self.table.weight = self.unmerged_table
        self._unmerged = []
        self.merged_adapters: list[str] = []
        for config in self.__dict__.pop("_untied_configs", []):
            config.tie_word_embeddings = True

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the wrapped module, which takes this layer's place in a model without PEFT.

        `CromeModel` merges before it unloads, so a layer that is not merged stays for another method to merge.
        """
        if merge and not self.folded:
            return self
        if not merge:
            self.unmerge()
            self.unload_trained_copy(merge=False)
        return self.base_layer

    def unload_trained_copy(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, merge: bool = True
    ) -> None:
        """Replace the wrapped module by the one that `modules_to_save` or `trainable_token_indices` trained."""
        if isinstance(self.base_layer, AuxiliaryTrainingWrapper):
            self.base_layer = self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    @property
    def table(self) -> Any:
        """The wrapped module, without `torch.compile` or a trained copy around it."""
        return original_module(self)

    @property
    def folded(self) -> bool:
        """Whether the table holds the merged adapters; a merged site that cannot fold still adds them."""
        return bool(self._unmerged)

    @property
    def unmerged_table(self) -> nn.Parameter | None:
        """The table before adapters were folded into it; None if none is folded."""
        return self._unmerged[0] if self._unmerged else None


def check_allowed(model: nn.Module, sites: dict[str, Any], names: list[str] | None, unload: bool = False) -> None:
    """Refuse a merge that would give a different model, before anything changes; log which branches stay modules.

    Args:
        sites: path -> `CromeLayer`.
        names: names of the adapters to merge; None: the active ones.
        unload: whether PEFT's layers are removed, which would lose what cannot be folded.
    Raises:
        ValueError: nothing can be folded, or a folded table would change the output; gives the reason.
    """
    for part in model.modules():
        if because := _why_not_mergeable(part):
            raise ValueError(
                f"Nothing can be merged: {type(part).__name__} {because}. Keep the adapter attached, or unload() it."
            )
    layers = {name: m for name, m in sites.items() if m._attached(m.active_adapters if names is None else names)}
    tables = {name: layer.table for name, layer in layers.items()}
    reasons = {name: why_not_foldable(table) for name, table in tables.items()}
    for name, layer in layers.items():
        layer._surveyed = reasons[name]
    folded = [name for name, reason in reasons.items() if not reason]
    kept = [name for name, reason in reasons.items() if reason]
    trained = [name for name in folded if isinstance(layers[name].base_layer, AuxiliaryTrainingWrapper)]
    if trained and not unload:
        remedy = "Keep the adapter attached." if kept else "Write merge_and_unload(), which keeps the trained one."
        raise ValueError(
            f"{trained} trains as well (modules_to_save or trainable_token_indices), and an adapter cannot be "
            f"folded into two copies of a table. {remedy}"
        )
    if not folded or (kept and unload):
        raise ValueError(
            f"{'Nothing' if not folded else 'Not all'} can be merged: "
            f"{'; '.join(f'{name}: {reasons[name]}' for name in kept) or 'no site has these adapters'}. Only a branch "
            "on an embedding table folds into weights. Keep the adapter attached: a decoded token does not meet a "
            "vision branch. To serve it, see peft_crome.serving; to take it off, unload()."
        )
    scales: dict[int, set[float]] = {}
    for name in folded:
        scales.setdefault(id(tables[name].weight), set()).add(float(embed_scale(tables[name])))
    if any(len(several) > 1 for several in scales.values()):
        raise ValueError(
            f"Nothing can be merged: {folded} share one table and scale its rows differently, so no one table holds "
            "what the adapter adds. Keep the adapter attached, or unload() it."
        )
    message = "CROME folded into the embedding table, so that prompts without an image change as well: %s."
    logger.warning(
        message + (" Not linear, and still attached: %s." if kept else ""), folded, *([kept] if kept else [])
    )


def _why_not_mergeable(module: nn.Module) -> str | None:
    """Return why a folded table would change what else `module` computes, or None if it would not."""
    config = getattr(module, "config", None)
    # Which relatives of T5 do so depends on the release of transformers.
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if getattr(config, TIE, False) and TIE in getattr(code, "co_names", ()):
        return f"scales its output where config.{TIE} is set, and a merge unties the head"
    return NOT_MERGEABLE.get(getattr(config, "model_type", ""))


def merge_for_good(model: nn.Module, sites: dict[str, Any], safe_merge: bool, names: list[str] | None) -> None:
    """Fold what folds in a model whose sites are removed. A trained table replaces the one it was copied from.

    Raises:
        ValueError: see `check_allowed`.
    """
    check_allowed(model, sites, names, unload=True)
    for site in sites.values():
        site.unload_trained_copy(safe_merge, names)
        site.merge(safe_merge, names)


def share_and_untie(model: nn.Module, sites: dict[str, Any]) -> None:
    """Share tables again that were one parameter before a merge, and keep the old table for the head."""
    merged = [site for site in sites.values() if site.folded]
    first: dict[int, nn.Parameter] = {}
    for site in merged:  # each fold computed the same values
        table = site.table
        table.weight = first.setdefault(id(site.unmerged_table), table.weight)
    # Otherwise a save or a resize would tie the head to the new table again.
    configs = [getattr(unwrapped(model), "config", None), text_config(model)]
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    for site in merged if tied else ():
        site._untied_configs = tied
    for config in tied:
        config.tie_word_embeddings = False
