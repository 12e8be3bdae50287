# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge

from .config import CromeConfig


GATE_ACTIVATIONS = {"silu": F.silu, "sigmoid": F.sigmoid}
# The number of rows of an embedding table that are merged at once, this bounds the memory of the hidden features
ROWS_PER_STEP = 8192


class CromeLayer(BaseTunerLayer):
    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("crome_gate", "crome_down", "crome_up")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ("crome_dropout", "gate_activation")

    def __init__(self, base_layer: nn.Module, crome_up: nn.ModuleDict, hidden_size: Optional[int]) -> None:
        self.base_layer = base_layer
        self.crome_gate = nn.ModuleDict({})
        self.crome_down = nn.ModuleDict({})
        # All layers hold the same ModuleDict, as the up-projection of an adapter is shared between them. Sharing the
        # modules and not the parameters ensures that this is still the case after the parameters were re-assigned.
        self.crome_up = crome_up
        self.crome_dropout = nn.ModuleDict({})
        self.gate_activation: dict[str, str] = {}
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []

        base_layer = self.get_base_layer()
        in_features, out_features = _get_in_out_features(base_layer)
        if out_features is None:
            # E.g. the projector of Gemma 3, which multiplies with a parameter. It returns what the language model takes.
            out_features = hidden_size
        if out_features is None:
            raise ValueError(
                f"Could not infer the size of the embeddings that target module {base_layer} returns. Please target a "
                "linear layer or an embedding table."
            )
        self.in_features = in_features
        self.out_features = out_features

    def update_layer(self, adapter_name: str, config: CromeConfig, embedding_rms: float) -> None:
        self.crome_gate[adapter_name] = nn.Linear(self.out_features, config.bottleneck_dim, bias=False)
        self.crome_down[adapter_name] = nn.Linear(self.out_features, config.bottleneck_dim, bias=False)
        self.crome_dropout[adapter_name] = nn.Dropout(config.crome_dropout)
        self.gate_activation[adapter_name] = config.gate_activation
        if adapter_name not in self.crome_up:
            self.crome_up[adapter_name] = nn.Linear(config.bottleneck_dim, self.out_features, bias=False)
        elif self.crome_up[adapter_name].out_features != self.out_features:
            raise ValueError(
                "All modules that are targeted by CROME should return embeddings of the same size, but the sizes "
                f"{self.crome_up[adapter_name].out_features} and {self.out_features} were found."
            )

        self.reset_crome_parameters(adapter_name, config.init_weights, embedding_rms)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_crome_parameters(self, adapter_name: str, init_weights: bool, embedding_rms: float) -> None:
        # The embeddings of some models are a hundred times larger than those of others. With this scale, what enters
        # the gate has unit variance for all of them.
        std = 1 / (embedding_rms * math.sqrt(self.out_features))
        nn.init.normal_(self.crome_gate[adapter_name].weight, std=std)
        nn.init.normal_(self.crome_down[adapter_name].weight, std=std)
        crome_up = self.crome_up[adapter_name]
        if init_weights:
            nn.init.zeros_(crome_up.weight)
        else:
            nn.init.normal_(crome_up.weight, std=embedding_rms / math.sqrt(crome_up.in_features))

    def _get_available_adapters(self) -> set[str]:
        # crome_up also holds the adapters of the other layers
        return set(self.crome_gate)

    def _get_base_layer_device_and_dtype(self, base_layer):
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        parameter = next(base_layer.parameters(), None)
        if (device is None) and (parameter is not None):
            # Not all projectors are linear layers with a weight of their own
            device, dtype = parameter.device, parameter.dtype
        return device, dtype

    def _add_adapters(self, embeds: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Return `x + (act(x W_gate) * (x W_down)) W_up`, with the last term summed over the adapters."""
        result = embeds
        for adapter_name in adapter_names:
            if adapter_name not in self.crome_gate:
                continue
            gate, down = self.crome_gate[adapter_name], self.crome_down[adapter_name]
            x = self._cast_input_dtype(embeds, gate.weight.dtype)
            hidden = GATE_ACTIVATIONS[self.gate_activation[adapter_name]](gate(x)) * down(x)
            hidden = self.crome_dropout[adapter_name](hidden)
            # The layers that share the up-projection can be on different devices
            result = result + F.linear(hidden, self.crome_up[adapter_name].weight.to(hidden.device))
        return result.to(embeds.dtype)

    def check_merge_allowed(self) -> None:
        """Raise a ValueError if the adapter cannot be merged exactly."""
        raise ValueError(
            f"CROME cannot be merged into a {type(self.get_base_layer()).__name__}, because the adapter is not linear. "
            "Only an embedding table can be merged. Please keep the adapter, or call `unload` to remove it."
        )


class Projection(nn.Module, CromeLayer):
    # CROME implemented for any module that returns embeddings
    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: CromeConfig,
        crome_up: nn.ModuleDict,
        hidden_size: Optional[int],
        embedding_rms: float,
    ) -> None:
        super().__init__()
        CromeLayer.__init__(self, base_layer, crome_up=crome_up, hidden_size=hidden_size)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, embedding_rms=embedding_rms)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Not supported, because the adapter is not linear.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if any(adapter_name in self.crome_gate for adapter_name in adapter_names):
            self.check_merge_allowed()

    def unmerge(self) -> None:
        """
        Nothing to do, as this layer cannot be merged.
        """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if not isinstance(result, torch.Tensor):
            raise TypeError(
                f"CROME adapts modules that return a tensor, but {type(self.get_base_layer()).__name__} returns a "
                f"{type(result).__name__}. Please target a module inside of it."
            )
        return self._add_adapters(result, self.active_adapters)

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "crome." + rep


class Embedding(Projection):
    # CROME implemented for an embedding table, whose output depends on the token alone, so that it can be merged
    _unmerged_weight: Optional[torch.Tensor] = None

    def check_merge_allowed(self) -> None:
        base_layer = self.get_base_layer()
        if (type(base_layer).forward is not nn.Embedding.forward) or (base_layer.max_norm is not None):
            raise ValueError(
                f"CROME cannot be merged exactly into a {type(base_layer).__name__}, because it does more than look up "
                "rows of its weight. Please keep the adapter, or call `unload` to remove it."
            )

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Merge the active adapter weights into the embedding table

        Args:
            safe_merge (`bool`, *optional*):
                If True, the merged weights are checked for NaNs before they replace the original weights. Defaults to
                `False`.
            adapter_names (`list[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [adapter_name for adapter_name in adapter_names if adapter_name in self.crome_gate]
        if not adapter_names:
            # no adapter to merge
            return

        self.check_merge_allowed()
        base_layer = self.get_base_layer()
        # The adapter cannot be subtracted from the merged weight, which is why the original one is kept
        orig_weight = base_layer.weight.data if self._unmerged_weight is None else self._unmerged_weight
        training = self.training
        self.eval()  # no dropout
        with torch.no_grad():
            to_merge = self.merged_adapters + adapter_names
            weight = torch.cat([self._add_adapters(rows, to_merge) for rows in orig_weight.split(ROWS_PER_STEP)])
        self.train(training)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_names[0]} seems to be broken")
        base_layer.weight.data = weight
        self._unmerged_weight = orig_weight
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return

        weight = self.get_base_layer().weight
        weight.data = self._unmerged_weight.to(device=weight.device, dtype=weight.dtype)
        self._unmerged_weight = None
        self.merged_adapters = []
