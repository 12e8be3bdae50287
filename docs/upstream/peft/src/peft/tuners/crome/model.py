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

from contextlib import contextmanager

import torch
from torch import nn

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_CROME_TARGET_MODULES_MAPPING

from .layer import CromeLayer, Embedding, Projection


class CromeModel(BaseTuner):
    """
    Creates a CROME (Cross-Modal Adapters) model from a pretrained vision-language model. The method is described in
    https://huggingface.co/papers/2408.06610.

    CROME adds a gated bottleneck to the embeddings that enter the language model, for example to those of the image.
    The weights of the language model and of the vision tower do not change.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`CromeConfig`]): The configuration of the CROME model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The CROME model.

    Example:

        ```py
        >>> from transformers import AutoModelForImageTextToText
        >>> from peft import CromeConfig, get_peft_model

        >>> model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf")
        >>> config = CromeConfig(target_modules=["multi_modal_projector.linear_2"])
        >>> model = get_peft_model(model, config)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`CromeConfig`]): The configuration of the CROME model.
    """

    prefix: str = "crome_"
    tuner_layer_cls = CromeLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_CROME_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        crome_config,
        adapter_name,
        target,
        target_name,
        parent,
        current_key,
    ):
        embedding_rms = self._get_embedding_rms()
        if isinstance(target, CromeLayer):
            target.update_layer(adapter_name, config=crome_config, embedding_rms=embedding_rms)
        else:
            new_module = self._create_new_module(crome_config, adapter_name, target, embedding_rms=embedding_rms)
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(self, crome_config, adapter_name, target, embedding_rms):
        target_base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(target_base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)):
            raise TypeError(
                f"Target module {target} is not supported. CROME adapts modules that return embeddings, e.g. the last "
                "linear layer of a projector or an embedding table."
            )
        new_module_cls = Embedding if isinstance(target_base_layer, nn.Embedding) else Projection
        return new_module_cls(
            target,
            adapter_name,
            config=crome_config,
            crome_up=self._get_crome_up(),
            hidden_size=self._get_hidden_size(),
            embedding_rms=embedding_rms,
        )

    def _get_crome_up(self) -> nn.ModuleDict:
        """The up-projections, which all layers share."""
        layers = (module for module in self.model.modules() if isinstance(module, CromeLayer))
        layer = next(layers, None)
        return nn.ModuleDict({}) if layer is None else layer.crome_up

    def _get_hidden_size(self) -> int | None:
        config = getattr(self.model, "config", None)
        return getattr(config.get_text_config(), "hidden_size", None) if hasattr(config, "get_text_config") else None

    def _get_embedding_rms(self) -> float:
        """The root mean square of a typical embedding of the language model, which scales the initial weights."""
        try:
            table = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return 1.0  # not a transformers model
        weight = getattr(table, "weight", None)
        if (weight is None) or weight.is_meta or not weight.is_floating_point():
            return 1.0
        norms = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=torch.float32)
        rms = norms.median().item() / weight.shape[-1] ** 0.5 * float(getattr(table, "embed_scale", 1.0))
        return rms if rms > 0.0 else 1.0

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # The parent method also assigns the weight, which not all projectors have, and moves the adapter to its device,
        # which the layer does itself.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            # The rows of a projector's output are the images of the whole batch or the patches of all of them. It does
            # not tell to which sample they belong.
            raise ValueError("CROME does not support different adapters for the samples of a batch (`adapter_names`).")
        yield

    def _check_merge_allowed_for(self, adapter_names: list[str] | None) -> None:
        """Raise before anything is changed if not all of the adapters can be merged exactly."""
        users: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), []).append(name)
        for name, module in self.model.named_modules():
            if not isinstance(module, CromeLayer):
                continue
            if not module._get_available_adapters().intersection(adapter_names or module.active_adapters):
                continue
            module.check_merge_allowed()
            tied = [user for user in users[id(module.weight)] if not user.startswith(f"{name}.")]
            if tied:
                raise ValueError(
                    f"CROME cannot be merged exactly into {name}, because its weight is tied with {tied}, which would "
                    "change as well. Please untie the weights, keep the adapter, or call `unload` to remove it."
                )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge_allowed_for(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ):
        if merge:
            self._check_merge_allowed_for(adapter_names)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # The up-projection is in the state_dict once for each layer, save it for the first layer of this adapter only.
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        gate, up = f"crome_gate.{adapter_name}.weight", f"crome_up.{adapter_name}.weight"
        first_up = next((key.removesuffix(gate) + up for key in to_return if key.endswith(gate)), None)
        return {key: value for key, value in to_return.items() if (key == first_up) or not key.endswith(up)}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        up = f"crome_up.{adapter_name}.weight"
        weight = next((value for key, value in state_dict.items() if key.endswith(up)), None)
        if weight is not None:
            state_dict.update({key: weight for key in model.state_dict() if key.endswith(up)})
        return state_dict
