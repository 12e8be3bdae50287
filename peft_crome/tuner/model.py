"""CromeModel: puts the adapter on a model's sites, and everything that PEFT asks of a tuner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from torch import nn

from .. import checks, merging, registration
from ..adapter_file import check_shapes, check_tensors
from ..attachment import roll_back, take_away_old
from ..backbone import (
    device_and_dtype,
    embedding_rms,
    embedding_rows,
    input_embeddings,
    original_module,
    placeholder_ids,
    replace_everywhere,
)
from ..four_bit import mend_repacking
from ..guard import arm, disarm
from ..mixed_batch import rows_with_adapters
from ..provenance import backbone_name, describe_backbone, record_backbone
from .config import CromeConfig
from .layer import CromeLayer, CromeWeights, TokenRanges
from .sites import default_bottleneck_dim, find_branches

# task_type -> what PEFT adds to modules_to_save: names of a head, of which a model has one
CLASSIFIER = ("classifier", "score")
HEADS = {"SEQ_CLS": CLASSIFIER, "TOKEN_CLS": CLASSIFIER, "QUESTION_ANS": ("qa_outputs",)}
WEIGHTS_NAME = "crome"  # the child of the wrapped model that holds every adapter's weights


class CromeModel(BaseTuner):
    """Cross-modal adapters where embeddings enter a frozen language model; arguments as in PEFT's other tuners."""

    prefix = "crome_"
    tuner_layer_cls = (CromeLayer, CromeWeights)  # type: ignore[assignment]  # PEFT only calls isinstance on it
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # sites.py has the hosts

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        registration.reach_transformers()
        checks.check_free(model, adapter_name, self.tuner_layer_cls)
        super().__init__(model, peft_config, adapter_name, **kwargs)

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
        config: CromeConfig = self.peft_config[adapter_name]
        branches = find_branches(model, config.branches, of_before=config.trained_on is not None)
        hidden_size = checks.find_hidden_size(model, branches)
        bottleneck_dim = config.bottleneck_dim or default_bottleneck_dim(len(branches))
        expected = checks.expected_shapes(branches, hidden_size, bottleneck_dim)
        checks.check_names(model, WEIGHTS_NAME, CromeWeights, adapter_name, expected)
        if config._file is not None:
            config._file.check_fits(model, expected, f"{backbone_name(model)} (hidden_size {hidden_size})")
        paths = {path: module for path, module in model.named_modules() if path}
        table = next((path for path, module in paths.items() if module is input_embeddings(model)), None)
        heads = HEADS.get(str(config.task_type), ())
        named = [*(config.modules_to_save or ()), *heads]  # PEFT adds them to the one it was given, later
        modules_to_save = checks.redirect_into_sites(named, "modules_to_save", branches, paths, heads)
        rows = getattr(input_embeddings(model), "num_embeddings", None)
        indices = checks.redirect_token_indices(config.trainable_token_indices, table, branches, paths, rows)
        before = dict(vars(config))
        record_backbone(config, describe_backbone(model, hidden_size, embedding_rows(model)))
        config.branches = config.branches or list(branches)
        config.bottleneck_dim = bottleneck_dim
        config.modules_to_save = list(modules_to_save) or config.modules_to_save
        config.trainable_token_indices = indices
        self._branches_of: dict[str, dict[str, TokenRanges]] = {}
        for branch, sites in branches.items():
            for site in sites:
                ranges = self._branches_of.setdefault(checks.site_path(site), {}).setdefault(branch, [])
                ranges.extend(checks.token_range(site))
        self._hidden_size = hidden_size
        # The file's keys name no sites, so a state dict cannot say where to inject: the configuration does.
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        old = take_away_old(model, WEIGHTS_NAME, adapter_name, CromeLayer)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None)
        except Exception:
            roll_back(model, WEIGHTS_NAME, adapter_name, CromeLayer, old)
            config.__dict__.update({"_described": False} | before)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)
            raise
        config.__dict__.pop("_file", None)  # its weights come next; a later use of this configuration is for another
        mend_repacking(model)
        arm(model, model._modules[WEIGHTS_NAME])  # type: ignore[arg-type]

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
        # Not by attributes: a compiled host reads them from the module that it wraps.
        weights: Any = self.model._modules.setdefault(WEIGHTS_NAME, CromeWeights())
        if adapter_name not in weights.crome_up:
            names = dict.fromkeys(branch for site in self._branches_of.values() for branch in site)
            weights.add(adapter_name, peft_config, names, self._hidden_size, embedding_rms(self.model))
            device, dtype = device_and_dtype(self.model)
            for linear in weights.linears_of(adapter_name).values():
                on_meta = linear.weight.is_meta  # then it stays there until its weights are loaded
                linear.to(device=None if on_meta else device, dtype=dtype)
            weights.train(target.training)
        if not isinstance(target, CromeLayer):
            target = CromeLayer(target, weights, self._hidden_size)
            target.training = target.base_layer.training  # a wrapper around the host may be in another mode
            replace_everywhere(self.model, target.base_layer, target)
        branches = target.branches_of[adapter_name] = self._branches_of[current_key]
        # Ovis 2 has a table of images as well.
        if "text" in branches and isinstance(original_module(target.get_base_layer()), nn.Embedding):
            target.placeholders = placeholder_ids(self.model)
        target._move_adapter_to_device_of_base_layer(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would also copy a weight that a projector does not have.
        replace_everywhere(self.model, child, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Not inside the sites: what `modules_to_save` trains there is a host's module, in the host's dtype.
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, CromeLayer):
                cast_adapter_dtype(module, adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        rows = nullcontext() if names is None else rows_with_adapters(self.model, names, args, kwargs)
        with rows:
            yield

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT's own raises where a model does not name its input embeddings (PP-FormulaNet).
        return super()._get_module_names_tied_with_embedding() if input_embeddings(self.model) is not None else []

    def _check_merge_allowed(self) -> None:
        """`merge_adapter` and `merge_and_unload` check more, and know which adapters are meant."""

    def _sites(self) -> list[CromeLayer]:
        return [module for module in self.model.modules() if isinstance(module, CromeLayer)]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the text branch into the embedding table; the others stay active. `unmerge_adapter` undoes it.

        Raises:
            ValueError: there is no branch on an embedding table, or see `merging.check_allowed`.
        """
        merging.check_allowed(self.model, self._sites(), adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        merging.share_and_untie(self.model, self._sites())

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = self._sites()
        if merge:
            merging.check_allowed(self.model, layers, adapter_names, unload=True)
            for layer in layers:
                layer.unload_trained_copy(safe_merge, adapter_names)
                layer.merge(safe_merge, adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            merging.share_and_untie(model, layers)
            for layer in self._sites():  # of adapters that were not to be merged
                replace_everywhere(model, layer, layer.base_layer)
        disarm(model)
        del self.model._modules[WEIGHTS_NAME]
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
        check_tensors(state_dict, f"adapter {adapter_name!r}")
        found = {key.split(f"{WEIGHTS_NAME}.")[-1]: v.shape for key, v in state_dict.items() if ".crome_" in f".{key}"}
        linears = weights.linears_of(adapter_name)
        expected = {f"{name}.weight": tuple(linear.weight.shape) for name, linear in linears.items()}
        check_shapes(found, expected, f"adapter {adapter_name!r} on {backbone_name(model)}")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
