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

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType


@dataclass
class CromeConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`CromeModel`].

    Args:
        target_modules (`Optional[Union[list[str], str]]`):
            The names of the modules whose output CROME adapts. These are the modules that produce embeddings for the
            language model, e.g. the last layer of the projector of a vision-language model and, optionally, the
            embedding table. All of them must return embeddings of the same size. When passing a string, a regex match
            will be performed. When passing a list of strings, either an exact match will be performed or it is checked
            if the name of the module ends with any of the passed strings. If this is not specified, the projector will
            be chosen according to the model architecture. If the architecture is not known, an error will be raised --
            in this case, you should specify the target modules manually.
        bottleneck_dim (`int`, *optional*, defaults to `256`):
            The number of hidden features of the bottleneck. With `n` target modules and embeddings of size `d`, the
            adapter has `(2 * n + 1) * d * bottleneck_dim` parameters.
        gate_activation (`Literal["silu", "sigmoid"]`, *optional*, defaults to `"silu"`):
            The activation function of the gate. The paper mentions both.
        crome_dropout (`float`, *optional*, defaults to `0.0`):
            The dropout probability of the hidden features.
        init_weights (`bool`, *optional*, defaults to `True`):
            If `True`, the up-projection is initialized with zeros, so that the adapter starts as an identity. If
            `False`, it is initialized randomly. This is discouraged.
        modules_to_save (`Optional[list[str]]`):
            List of modules apart from CROME layers to be set as trainable and saved in the final checkpoint.
    """

    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "List of module names or regex expression of the module names whose output CROME adapts. These are the "
                "modules that produce embeddings for the language model. For example, "
                "['multi_modal_projector.linear_2'] or ['multi_modal_projector.linear_2', 'embed_tokens']. "
                "If not specified, the projector will be chosen according to the model architecture. If the "
                "architecture is not known, an error will be raised -- in this case, you should specify the target "
                "modules manually."
            ),
        },
    )
    bottleneck_dim: int = field(
        default=256,
        metadata={
            "help": "The number of hidden features of the bottleneck. With n target modules and embeddings of size d, "
            "the adapter has (2 * n + 1) * d * bottleneck_dim parameters."
        },
    )
    gate_activation: Literal["silu", "sigmoid"] = field(
        default="silu",
        metadata={"help": "The activation function of the gate, 'silu' or 'sigmoid'. The paper mentions both."},
    )
    crome_dropout: float = field(default=0.0, metadata={"help": "The dropout probability of the hidden features."})
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Whether to initialize the up-projection with zeros, so that the adapter starts as an identity. "
            "Setting this to False is discouraged."
        },
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "List of modules apart from CROME layers to be set as trainable and saved in the final checkpoint."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.CROME
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        if self.bottleneck_dim <= 0:
            raise ValueError(
                f"`bottleneck_dim` should be a positive integer but the value passed is {self.bottleneck_dim}"
            )
        if self.gate_activation not in ("silu", "sigmoid"):
            raise ValueError(
                f"`gate_activation` should be 'silu' or 'sigmoid' but the value passed is {self.gate_activation!r}"
            )
        if not 0.0 <= self.crome_dropout < 1.0:
            raise ValueError(f"`crome_dropout` should be in [0, 1) but the value passed is {self.crome_dropout}")
