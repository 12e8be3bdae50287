"""The adapter's configuration, validated when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ..adapter_file import read_adapter_shapes
from ..card import add_usage

GATE_ACTIVATIONS = ("silu", "sigmoid")
INIT_SCHEMES = ("scaled", "normal")


@dataclass
class CromeConfig(PeftConfig):
    """Configuration of a CROME adapter (arXiv 2408.06610): one gated bottleneck per branch, one shared up-projection.

    Raises:
        ValueError, TypeError: a field is wrong; the message names the field, the value and what to write.
    """

    bottleneck_dim: int = field(
        default=256,
        metadata={"help": "Hidden features m; 256 costs 5.2M weights at width 4096 (5·d·m, two branches)."},
    )
    branches: dict[str, list[str] | str] | None = field(
        default=None,
        metadata={
            "help": "Branch -> names (full paths or last parts) of the modules that produce its embeddings, or a "
            "regex for full paths: {'text': ['embed_tokens'], 'vision': '.*projector'}. None: looked up."
        },
    )
    gate_activation: str = field(
        default="silu", metadata={"help": "'silu' or 'sigmoid'; the paper's prose names both."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropping a hidden feature in training."})
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: an identity (W_u is zero), W_g and W_d 'scaled' by what they read. 'normal': standard "
            "deviation of 0.02. False: 'scaled' and W_u random too, for tests."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, e.g. the projector."}
    )
    target_modules: None = field(default=None, metadata={"help": "Always None: CROME's modules are in `branches`."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embedding rows train as well (PEFT's trainable tokens)."}
    )
    trained_on: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in at attachment: the backbone, to warn when it is another one."}
    )

    _file_shapes = None  # no annotation, so no field: what the file beside this configuration holds, never saved

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CROME  # type: ignore[attr-defined]  # added by registration.py
        if isinstance(self.bottleneck_dim, bool) or not isinstance(self.bottleneck_dim, int):
            raise TypeError(f"bottleneck_dim={self.bottleneck_dim!r} is not an int. Write bottleneck_dim=256.")
        if self.bottleneck_dim < 1:
            raise ValueError(f"bottleneck_dim={self.bottleneck_dim} is not positive. Write bottleneck_dim=256.")
        if self.gate_activation not in GATE_ACTIVATIONS:
            raise ValueError(
                f"gate_activation={self.gate_activation!r} is unknown; expected one of {GATE_ACTIVATIONS}. "
                "Write gate_activation='silu'."
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is not a probability in [0, 1). Write dropout=0.0.")
        if not isinstance(self.init_weights, bool) and self.init_weights not in INIT_SCHEMES:
            raise ValueError(
                f"init_weights={self.init_weights!r} is unknown; expected True, False or one of {INIT_SCHEMES}. "
                "Write init_weights=True."
            )
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save is a string. Write modules_to_save=[{self.modules_to_save!r}].")
        if self.target_modules is not None:
            raise ValueError(
                f"target_modules={self.target_modules!r}: CROME's modules are named by branch. "
                f"Write branches={{'vision': {self.target_modules!r}}}."
            )
        self._check_branches()

    def _check_branches(self) -> None:
        example = "branches={'text': ['embed_tokens'], 'vision': ['multi_modal_projector']}"
        if self.branches is None:
            return
        if not isinstance(self.branches, dict) or not self.branches:
            raise TypeError(f"branches={self.branches!r} is not a dict with an entry per branch. Write {example}.")
        for name, modules in self.branches.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"branches: the name {name!r} is not an identifier. Write {example}.")
            names = [modules] if isinstance(modules, str) else modules
            if not isinstance(names, (list, tuple)) or not names or not all(n and isinstance(n, str) for n in names):
                raise TypeError(f"branches[{name!r}]={modules!r} is no list of names and no regex. Write {example}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a configuration and read the header of the weights beside it, before any model is touched.

        Raises:
            ValueError: the weight file is truncated, not safetensors, or holds no CROME weights.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_kwargs, _, _ = cls._split_kwargs(kwargs)
        config._file_shapes = read_adapter_shapes(pretrained_model_name_or_path, subfolder, **hub_kwargs)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and say in the model card that loading needs `import peft_crome`."""
        super().save_pretrained(save_directory, **kwargs)
        add_usage(save_directory, self)
