"""The adapter's configuration, validated when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from ..sharing.card import write_card
from ..sharing.card_details import CardDetails
from ..sharing.weight_file import AdapterFile, read_adapter_file
from .config_checks import check_config


@dataclass
class CromeConfig(PeftConfig):
    """Configuration of a CROME adapter (arXiv 2408.06610): one gated bottleneck per branch, one shared up-projection.

    Raises:
        ValueError, TypeError: A field is wrong. The message names the field, the value and what to write.
    """

    bottleneck_dim: int | None = field(
        default=None,
        metadata={
            "help": "Hidden features m. None: 424 for one branch, 256 for two, 184 for three, so that the adapter has "
            "about 1280·d weights at width d (5.2M at 4096). Filled in at attachment."
        },
    )
    branches: list[str] | dict[str, list[str] | str] | None = field(
        default=None,
        metadata={
            "help": "None: the branches that carry images and sound; a prompt without them gets the base model's "
            "answer. A list of names: ['text', 'vision']; 'text' on an embedding table changes every prompt. A dict: "
            "branch -> names (full paths or last parts) of the modules that produce its embeddings, or a regex for "
            "full paths: {'vision': '.*projector'}. Filled in with names at attachment."
        },
    )
    gate_activation: str = field(default="silu", metadata={"help": "'silu' or 'sigmoid'; the paper names both."})
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropping a hidden feature in training."})
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: W_u is zero, so the adapter starts as an identity; W_g and W_d are random, scaled by the "
            "model's embeddings. 'normal': W_g and W_d have a standard deviation of 0.02. False: W_u is random too."
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
        default=None, metadata={"help": "Filled in at attachment: the model, to warn when it is loaded on another."}
    )

    # These are not fields, so they are never saved.
    _file: ClassVar[AdapterFile | None] = None  # header of the weight file that it was loaded with
    _card: ClassVar[CardDetails | None] = None  # details for the model card
    _described: ClassVar[bool] = False  # whether this process filled in `trained_on`

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CROME  # type: ignore[attr-defined]  # added by registration.py
        check_config(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a configuration and read the header of the weights beside it, before any model is touched.

        Raises:
            ValueError: a field is wrong, or `read_adapter_file` rejects the weight file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_kwargs, _, _ = cls._split_kwargs(kwargs)
        config._file = read_adapter_file(pretrained_model_name_or_path, subfolder, **hub_kwargs)
        if config._file is not None:
            # Earlier releases saved no branches and had another default, so they are read from the weights.
            config.branches = config.branches or config._file.branches()
            config.bottleneck_dim = config.bottleneck_dim or config._file.hidden_features()
            config._file.check_host(config.modules_to_save, config.trainable_token_indices, config.bottleneck_dim)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and write the model card."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self)
