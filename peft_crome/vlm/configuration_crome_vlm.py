"""Configuration of the composite: any vision tower joined to any language model."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

# Arguments of `from_pretrained` that configurations and processors understand as well.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")

# How image tokens are made. `from_backbones` and recipes take these under the same names.
IMAGE_OPTIONS = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_pool_size",
    "image_projection_bias",
    "num_query_tokens",
    "image_token_order",
)

# A part's configuration -> its model_type if the dictionary has none. Only the Q-Former is optional.
PARTS = {"vision_config": "clip_vision_model", "text_config": "llama", "qformer_config": "instructblip_qformer"}


@strict
class CromeVLMConfig(PreTrainedConfig):
    """Configure a frozen vision tower and a frozen language model that a linear image projection joins.

    Attributes:
        vision_config: the tower's configuration, or its dictionary.
        text_config: the language model's configuration, or its dictionary.
        vision_model_name_or_path: where the tower's weights are; None: they are stored with the composite.
        vision_revision: branch, tag or commit of that repository; None: its default branch.
        text_model_name_or_path: where the language model's weights are; None: they are stored with the composite.
        text_revision: branch, tag or commit of that repository; None: its default branch.
        vision_quantization_config: how to quantize the tower while loading it; None: as in its checkpoint.
        text_quantization_config: how to quantize the language model while loading it; None: as in its checkpoint.
        image_token_id: id of the image placeholder; it may lie outside the embedding table, which is never resized.
        image_size: height and width of the tower's input in pixels, or one number for both; None: the tower's size.
        image_seq_length: tokens per image in the prompt, after pooling; None: computed when the model is built.
        vision_feature_layer: -1: the tower's output (`last_hidden_state`, after its final norm if it has one);
            any other number indexes its `hidden_states`; -2 is the penultimate layer, as in the paper.
        vision_feature_select_strategy: "default" drops the tokens before the patches (CLS, registers); "full" keeps
            them.
        vision_pool_size: n averages n x n neighboring patches into one token; 1 keeps every patch.
        image_projection_bias: whether the image projection has a bias.
        qformer_config: the Q-Former's configuration, or its dictionary; None: the composite has none.
        qformer_model_name_or_path: the InstructBLIP or BLIP-2 checkpoint that has the Q-Former's weights; None: they
            are stored with the composite.
        qformer_revision: branch, tag or commit of that repository; None: its default branch.
        num_query_tokens: number of tokens that the Q-Former makes of an image.
        image_token_order: kinds of image tokens in order: "query" for the Q-Former's, "patch" for the patches'. None:
            ["query", "patch"] with a Q-Former, as in the paper, else ["patch"].
        has_adapter: whether an adapter is stored beside the composite, as after a training stage; loading expects it.

    Raises:
        ValueError: a number is out of range, the two image token counts differ, or an order names a missing kind.

    Example:
        >>> config = CromeVLMConfig(vision_config={"model_type": "dinov2"}, text_config={"model_type": "qwen3"})
        >>> config.text_config.model_type
        'qwen3'
    """

    model_type = "crome_vlm"
    # Every release finds the parts by this name only. PARTS has the type of a part without a model_type.
    sub_configs: ClassVar[dict[str, Any]] = dict.fromkeys(PARTS, AutoConfig)
    auto_map: ClassVar[dict[str, str]] = {}  # no code on the Hub; TRL reads this for models loaded by name
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "image_hidden_states",
        "encoder_last_hidden_state",
    ]

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_model_name_or_path: str | None = None
    vision_revision: str | None = None
    text_model_name_or_path: str | None = None
    text_revision: str | None = None
    vision_quantization_config: dict[str, Any] | None = None
    text_quantization_config: dict[str, Any] | None = None
    image_token_id: int = 32000
    image_size: int | list[int] | tuple[int, ...] | None = None
    image_seq_length: int | None = None
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_pool_size: int = 1
    image_projection_bias: bool = True
    qformer_config: dict[str, Any] | PreTrainedConfig | None = None
    qformer_model_name_or_path: str | None = None
    qformer_revision: str | None = None
    num_query_tokens: int = 32
    image_token_order: list[str] | None = None
    has_adapter: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, model_type in PARTS.items():
            part_config = getattr(self, name)
            if part_config is None and name != "qformer_config":
                part_config = {}
            if isinstance(part_config, dict):
                setattr(self, name, AutoConfig.for_model(**{"model_type": model_type, **part_config}))
        # The base class would reset the parts' choices; keep them unless the caller overrides them.
        for choice in ("attn_implementation", "experts_implementation"):
            if kwargs.get(choice) is None:
                chosen = {key: getattr(getattr(self, key), f"_{choice}", None) for key in self.sub_configs}
                kwargs[choice] = {key: value for key, value in chosen.items() if value is not None}
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = bool(self.text_config.is_encoder_decoder)
        self.tie_word_embeddings = False  # the language model ties its weights; the composite adds no tie
        if self.image_size is None:
            of_timm = getattr(self.vision_config, "pretrained_cfg", None) or {}
            size = getattr(self.vision_config, "image_size", None)
            self.image_size = size if size is not None else of_timm.get("input_size", ())[1:] or None
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id={self.image_token_id} must be 0 or more; take the processor's.")
        kinds = ["patch"] if self.qformer_config is None else ["query", "patch"]
        if self.image_token_order is None:
            self.image_token_order = kinds
        unknown = [kind for kind in self.image_token_order if kind not in kinds]
        if unknown or not self.image_token_order or len(set(self.image_token_order)) < len(self.image_token_order):
            raise ValueError(
                f"image_token_order={self.image_token_order} must name each of {kinds} once at most"
                f"{', as there is no qformer_config' if len(kinds) == 1 else ''}; write image_token_order={kinds}."
            )
        if self.qformer_config is not None and "query" not in self.image_token_order:
            raise ValueError(
                f"image_token_order={self.image_token_order} leaves the Q-Former without use. Leave qformer_config "
                "out (from_backbones without qformer=), or write image_token_order=['query', 'patch']."
            )
        if self.num_query_tokens < 1:
            raise ValueError(f"num_query_tokens={self.num_query_tokens} must be 1 or more; the paper has 32.")
        if self.vision_pool_size < 1:
            raise ValueError(
                f"vision_pool_size={self.vision_pool_size} must be 1 or more; write vision_pool_size=1 to keep every "
                "patch, 2 to average 2 x 2 patches."
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert the configuration to JSON-ready values, with a quantization applied while loading recorded once."""
        output = super().to_dict()
        for part in ("vision", "text"):
            if output[f"{part}_quantization_config"] is not None:
                output[f"{part}_config"].pop("quantization_config", None)
        return output

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width in pixels of the tower's input images.

        Raises:
            ValueError: neither the composite nor the tower states a size.
        """
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        if self.image_size is not None and len(self.image_size) == 2:
            return self.image_size[0], self.image_size[1]
        raise ValueError(
            f"The image size of {self.vision_config.model_type!r} is {self.image_size}: expected a number or "
            "(height, width). Write image_size=224, or what the tower was trained on."
        )


def quantization_to_dict(quantization_config: QuantizationConfigMixin | dict[str, Any] | None) -> dict | None:
    """Copy a quantization configuration into JSON-ready values; None stays None."""
    if isinstance(quantization_config, QuantizationConfigMixin):
        return quantization_config.to_dict()
    return None if quantization_config is None else dict(quantization_config)


def revision_argument(revision: str | None) -> dict[str, str]:
    """Build the argument of `from_pretrained` for a revision; empty for a repository's default branch."""
    return {} if revision is None else {"revision": revision}


__all__ = ["CromeVLMConfig"]
