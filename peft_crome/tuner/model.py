"""CromeModel puts the adapter on a model's sites and does everything that PEFT asks of a tuner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from torch import nn

from ..backbone.four_bit import fix_repacking
from ..backbone.model import input_embeddings, part_for_good, replace_everywhere, tied_weights
from ..backbone.trainers import watch_trainers
from .attaching.also_trained import tie_trained_tokens
from .attaching.checks import check_free, check_loaded
from .attaching.plan import plan
from .attaching.rollback import take_weights_off
from .config import CromeConfig
from .guard import arm, disarm
from .layer import CromeLayer, crome_layers
from .merging.merge import check_allowed, merge_for_good, share_and_untie
from .mixed_batch.calls import rows_with_adapters
from .weights import NAME, CromeWeights
from .without_sites import sites_out


class CromeModel(BaseTuner):
    """CROME adapters where embeddings enter a frozen language model. It takes the arguments of PEFT's other tuners."""

    prefix = "crome_"
    tuner_layer_cls = (CromeLayer, CromeWeights)  # type: ignore[assignment]  # PEFT only calls isinstance on it
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # sites/ has the hosts

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        watch_trainers()
        check_free(model, adapter_name, self.tuner_layer_cls)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Check everything that can be checked, then wrap the sites. An error leaves the model unchanged.

        Raises:
            ValueError: see `plan`.
        """
        self._attachment = plan(model, adapter_name, self.peft_config[adapter_name])
        try:
            with self._attachment.or_undone():
                # The keys of a state dict name no sites. The configuration says where to inject.
                super().inject_adapter(model, adapter_name, *args, **kwargs | {"state_dict": None})
                tie_trained_tokens(model, adapter_name, self.peft_config[adapter_name].inference_mode)
        finally:
            del self._attachment
        fix_repacking(model)
        arm(model, model._modules[NAME])  # type: ignore[arg-type]

    def _check_target_module_exists(self, peft_config: CromeConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._attachment.sites

    def _prepare_adapter_config(self, peft_config: CromeConfig, model_config: dict[str, Any]) -> CromeConfig:
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, current_key: str, **kwargs: Any
    ) -> None:
        # This makes the weights as well. PEFT would take earlier ones for another adapter's and create none on meta.
        self._attachment.wrap(current_key, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's implementation would also copy a weight, which a projector does not have.
        replace_everywhere(self.model, child, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The sites are left out: a module that `modules_to_save` trains inside one keeps the host's dtype.
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, CromeLayer):
                cast_adapter_dtype(module, adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else rows_with_adapters(self.model, names, args, kwargs):
            yield

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT's implementation raises where a model does not name its input embeddings (PP-FormulaNet).
        return super()._get_module_names_tied_with_embedding() if input_embeddings(self.model) is not None else []

    def _check_merge_allowed(self) -> None:
        """Do nothing: `check_allowed` knows which adapters are to be merged."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the text branch into the embedding table. The others stay active, and `unmerge_adapter` undoes it.

        Raises:
            ValueError: no branch is on an embedding table, or folding it would change the model's output.
        """
        sites = dict(crome_layers(self.model))
        check_allowed(self.model, sites, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        share_and_untie(self.model, sites)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        sites = dict(crome_layers(self.model))
        if merge:
            with sites_out(self.model):
                tied = tied_weights(self.model)
            merge_for_good(self.model, sites, safe_merge, adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            share_and_untie(model, sites)
            part_for_good(model, tied)
            for _, layer in list(crome_layers(self.model)):  # these adapters were not to be merged
                replace_everywhere(model, layer, layer.base_layer)
        disarm(model)
        take_weights_off(self.model)
        return model

    @classmethod
    def _get_adapter_state_dict(cls, **kwargs: Any) -> dict[str, torch.Tensor]:
        state = super()._get_adapter_state_dict(**kwargs)
        return {key: value for key, value in state.items() if f".{NAME}.crome_" in f".{key}"}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CromeConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        check_loaded(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
