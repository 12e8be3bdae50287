"""CromeModel: puts the adapter on a model's sites, and everything that PEFT asks of a tuner."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .. import checks
from ..adapter_file import check_shapes
from ..backbone import (
    device_and_dtype,
    embedding_rms,
    embedding_rows,
    input_embeddings,
    placeholder_ids,
    replace_everywhere,
    text_config,
)
from ..guard import arm, disarm
from ..provenance import backbone_name, describe_backbone, record_backbone
from .config import CromeConfig
from .fold import why_not_foldable
from .layer import CromeLayer, CromeWeights, TokenRanges
from .sites import find_branches

logger = logging.getLogger(__name__)

# model_type -> why a folded table would not give the adapted model's output
NOT_MERGEABLE = {
    "udop": "scales its output where config.tie_word_embeddings is set, and a merge unties the head",
    "diffusion_gemma": "also averages its table's rows, for self-conditioning, which the adapter leaves as they are",
}
WEIGHTS_NAME = "crome"  # the child of the wrapped model that holds every adapter's weights


class CromeModel(BaseTuner):
    """Cross-modal adapters where embeddings enter a frozen language model; arguments as in PEFT's other tuners."""

    prefix = "crome_"
    tuner_layer_cls = (CromeLayer, CromeWeights)  # type: ignore[assignment]  # PEFT only calls isinstance on it
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # sites.py has the hosts

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Check everything that can be checked, then wrap the sites; an error leaves the model as it was.

        Raises:
            ValueError: see `find_branches`, and `checks.py` for what must fit.
        """
        # A copy: what is filled in below belongs to this model, and a caller may use the configuration again.
        config: CromeConfig = copy.copy(self.peft_config[adapter_name])
        branches = find_branches(model, config.branches)
        hidden_size = checks.find_hidden_size(model, branches)
        present: checks.Branches = {}
        for name, module in model.named_modules():
            if isinstance(module, CromeLayer):
                for branch, ranges in module.branches.items():
                    present.setdefault(branch, []).extend(checks.with_ranges(name, ranges))
        checks.check_same_branches(present, branches, adapter_name)
        expected = checks.expected_shapes(branches, hidden_size, config.bottleneck_dim)
        checks.check_names(model, WEIGHTS_NAME, CromeWeights, adapter_name, expected)
        if config._file_shapes is not None:
            check_shapes(config._file_shapes, expected, f"{backbone_name(model)} (hidden_size {hidden_size})")
        paths = {path: module for path, module in model.named_modules() if path}
        table = next((path for path, module in paths.items() if module is input_embeddings(model)), None)
        modules_to_save = checks.redirect_into_sites(config.modules_to_save, "modules_to_save", branches, paths)
        indices = checks.redirect_token_indices(config.trainable_token_indices, table, branches, paths)
        config.trained_on = record_backbone(config, describe_backbone(model, hidden_size, embedding_rows(model)))
        config.modules_to_save = list(modules_to_save) or config.modules_to_save
        config.trainable_token_indices = indices
        self.peft_config[adapter_name] = config
        self._branches_of: dict[str, dict[str, TokenRanges]] = {}
        for branch, sites in branches.items():
            for site in sites:
                ranges = self._branches_of.setdefault(checks.site_path(site), {}).setdefault(branch, [])
                ranges.extend(checks.token_range(site))
        self._hidden_size = hidden_size
        # The file's keys name no sites, so a state dict cannot say where to inject: the configuration does.
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None)
        except Exception:
            self._roll_back(model, adapter_name, first=not present)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)
            raise
        arm(model, getattr(model, WEIGHTS_NAME))

    def _roll_back(self, model: nn.Module, adapter_name: str, first: bool) -> None:
        for module in list(model.modules()):
            if isinstance(module, CromeWeights):
                module.delete_adapter(adapter_name)
            elif isinstance(module, CromeLayer) and first:
                replace_everywhere(model, module, module.base_layer)
        if first and hasattr(model, WEIGHTS_NAME):
            delattr(model, WEIGHTS_NAME)

    def _check_target_module_exists(self, peft_config: CromeConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._branches_of

    def _prepare_adapter_config(self, peft_config: CromeConfig, model_config: dict[str, Any]) -> CromeConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: CromeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # All is made here: PEFT puts what this call makes on the meta device for low_cpu_mem_usage, and would take a
        # tuner layer that is there before the first injection for an older adapter.
        if not hasattr(self.model, WEIGHTS_NAME):
            names = dict.fromkeys(branch for site in self._branches_of.values() for branch in site)
            self.model.add_module(WEIGHTS_NAME, CromeWeights(list(names)))
        weights: CromeWeights = getattr(self.model, WEIGHTS_NAME)
        if adapter_name not in weights.crome_up:
            weights.add(adapter_name, peft_config, self._hidden_size, embedding_rms(self.model))
            device, dtype = device_and_dtype(self.model)
            for linears in (getattr(weights, name) for name in weights.adapter_layer_names):
                on_meta = linears[adapter_name].weight.is_meta  # then it stays there until its weights are loaded
                linears[adapter_name].to(device=None if on_meta else device, dtype=dtype)
            weights.train(self.model.training)
        if not isinstance(target, CromeLayer):
            branches = self._branches_of[current_key]
            is_table = isinstance(target, nn.Embedding) and "text" in branches  # Ovis 2 has a table of images as well
            placeholders = placeholder_ids(self.model) if is_table else ()
            target = CromeLayer(target, weights, branches, self._hidden_size, placeholders)
            target.train(self.model.training)
            replace_everywhere(self.model, target.base_layer, target)
        target._move_adapter_to_device_of_base_layer(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would also copy a weight that a projector does not have.
        replace_everywhere(self.model, child, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this method PeftModel would drop adapter_names without a word.
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "adapter_names is not supported by CROME yet. Run one batch per adapter: model.set_adapter(name)."
            )
        yield

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT's own raises where a model does not name its input embeddings (PP-FormulaNet).
        return super()._get_module_names_tied_with_embedding() if input_embeddings(self.model) is not None else []

    def _check_merge_allowed(self) -> None:
        config: Any = getattr(self.model, "config", None)
        because = NOT_MERGEABLE.get(getattr(config, "model_type", ""))
        if because:
            raise ValueError(
                f"Nothing can be merged: {type(self.model).__name__} {because}. Keep the adapter attached, or "
                "unload() it."
            )
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, CromeLayer)}
        reasons = {name: why_not_foldable(layer.get_base_layer()) for name, layer in layers.items()}
        if all(reasons.values()):
            raise ValueError(
                f"Nothing can be merged: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}. Only a "
                "branch on an embedding table folds into weights. Keep the adapter attached, or unload() it."
            )
        folded = [name for name, reason in reasons.items() if not reason]
        kept = [name for name, reason in reasons.items() if reason]
        message = "CROME merge: folded into the embedding table: %s; kept as a small module, not being linear: %s. "
        logger.warning(
            message + "Only an adapter's files carry the latter: save it, not the merged model.", folded, kept
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the text branch into the embedding table; the others stay active. `unmerge_adapter` undoes it."""
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        _share([layer for layer in self.model.modules() if isinstance(layer, CromeLayer) and layer.merged])
        self._untie()

    def _untie(self) -> None:
        # The head keeps the old table; a save or a resize would tie it to the new one again.
        config = getattr(self.model, "config", None)
        configs = [config, text_config(self.model)]
        tied = [c for c in configs if getattr(c, "tie_word_embeddings", False)]
        for layer in self.model.modules():
            if isinstance(layer, CromeLayer) and layer.merged and tied:
                layer._untied_configs = tied
        for config in tied:
            config.tie_word_embeddings = False

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        layers = [layer for layer in self.model.modules() if isinstance(layer, CromeLayer)]
        if merge:
            self._check_merge_allowed()
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            _share([layer for layer in layers if layer.merged])
            self._untie()
        disarm(getattr(model, WEIGHTS_NAME))
        delattr(model, WEIGHTS_NAME)
        return model

    @classmethod
    def _get_adapter_state_dict(cls, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(**kwargs)
        return {key: value for key, value in found.items() if f".{WEIGHTS_NAME}.crome_" in f".{key}"}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CromeConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        weights = next(module for module in model.modules() if isinstance(module, CromeWeights))
        found = {key.split(f"{WEIGHTS_NAME}.")[-1]: v.shape for key, v in state_dict.items() if ".crome_" in f".{key}"}
        layers = {name: getattr(weights, name)[adapter_name] for name in weights.adapter_layer_names}
        expected = {f"{name}.weight": tuple(linear.weight.shape) for name, linear in layers.items()}
        check_shapes(found, expected, f"adapter {adapter_name!r} on {backbone_name(model)}")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _share(layers: list[CromeLayer]) -> None:
    """Tables that were one parameter before they were folded are one again: each fold gave the same values."""
    first: dict[int, nn.Parameter] = {}
    for layer in layers:
        table = layer.get_base_layer()
        if layer._unmerged_table is not None:
            table.weight = first.setdefault(id(layer._unmerged_table), table.weight)
