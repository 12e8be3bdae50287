"""Build the composite from a vision tower and a language model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .blip_parts import PARTS_CLASSES, load_parts, qformer_of
from .configuration_crome_vlm import HUB_ARGUMENTS, CromeVLMConfig, quantization_to_dict
from .fingerprint import take_samples
from .image_size import fixed_image_size
from .image_token import ensure_image_token
from .qformer import QFormer
from .vision import find_vision_model, vision_class

Composite = TypeVar("Composite", bound=PreTrainedModel)
Quantization: TypeAlias = QuantizationConfigMixin | dict[str, Any]
PARTS = ("vision_tower", "language_model")
BETWEEN = ("image_projection", "qformer", "text_projection")


@dataclass(frozen=True)
class Loading:
    """How backbones are loaded; the same for both unless a mapping tells them apart.

    Args:
        dtype: as in transformers; None: the checkpoint's.
        device_map: as in transformers; a dictionary names the composite's modules (`language_model.model.layers.0`).
        attn_implementation: a name, or {"vision_config": name, "text_config": name}.
        arguments: other arguments of `from_pretrained` (`cache_dir`, `token`, `local_files_only`, ...).
    """

    dtype: torch.dtype | str | None = None
    device_map: Any = None
    attn_implementation: str | Mapping[str, str] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """The arguments that processors and configurations understand too."""
        return {name: value for name, value in self.arguments.items() if name in HUB_ARGUMENTS}

    def for_part(self, part: str) -> dict[str, Any]:
        """Arguments of `from_pretrained` for "vision_tower" or "language_model".

        Raises:
            ValueError: a device_map dictionary has no entry for the part.
        """
        key = "vision_config" if part == "vision_tower" else "text_config"
        attention = self.attn_implementation
        attention = attention.get(key) if isinstance(attention, Mapping) else attention
        device_map = self.device_map
        if isinstance(device_map, Mapping):
            inside = {k: d for k, d in device_map.items() if k == part or k.startswith(f"{part}.")}
            device_map = {k.removeprefix(part).removeprefix("."): device for k, device in inside.items()}
            if not device_map and "" not in self.device_map:
                raise ValueError(
                    f"device_map has keys {list(self.device_map)}, none for {part!r}; add {part!r}: 'cpu'."
                )
            device_map = device_map or {"": self.device_map[""]}
        chosen = {"attn_implementation": attention, "device_map": device_map}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return {"dtype": self.dtype if self.dtype is not None else "auto", **chosen, **self.arguments}


def from_backbones(
    cls: type[Composite],
    vision: str | PreTrainedModel,
    language: str | PreTrainedModel,
    *,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    quantization_config: Quantization | None = None,
    vision_quantization_config: Quantization | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    image_token_id: int | None = None,
    image_size: int | list[int] | tuple[int, int] | None = None,
    vision_feature_layer: int = -1,
    vision_feature_select_strategy: str = "default",
    vision_pool_size: int = 1,
    image_projection_bias: bool = True,
    qformer: QFormer | PreTrainedConfig | dict[str, Any] | None = None,
    num_query_tokens: int = 32,
    image_token_order: list[str] | None = None,
    **kwargs: Any,
) -> Composite:
    """Join a vision tower and a language model; both are frozen, what is new between them trains.

    Args:
        cls: the composite's class.
        vision: name of a tower (or of a dual model such as CLIP), or a model object, which is used as it is, and is
            stored with the composite: its weights may be other ones than where it came from.
        language: name of a causal or encoder-decoder language model, or a model object, in the same way. Only a
            quantised object goes by the name that it was loaded by.
        vision_revision: branch, tag or commit of the tower's repository.
        text_revision: branch, tag or commit of the language model's repository.
        quantization_config: quantises the language model while it is loaded.
        vision_quantization_config: quantises the tower while it is loaded.
        dtype: of both backbones; None: each as its checkpoint. Model objects keep theirs.
        device_map: as in transformers; a dictionary names the composite's modules.
        attn_implementation: one for both, or {"vision_config": ..., "text_config": ...}.
        image_token_id: id of the placeholder; None: by the rule that the processor follows too.
        image_size: pixels, one number or (height, width); None: what the tower's image processor gives, else the
            tower's own.
        vision_feature_layer, vision_feature_select_strategy, vision_pool_size, image_projection_bias: see
            `CromeVLMConfig`.
        qformer: a Q-Former's configuration, or its dictionary, for a new one that trains; or a trained one, which is
            used as it is, frozen; None: there is none.
        num_query_tokens, image_token_order: see `CromeVLMConfig`.
        kwargs: other arguments of `from_pretrained` for both backbones (`cache_dir`, `token`, ...).
    Returns:
        The composite in evaluation mode.
    Raises:
        ValueError: a part is not what it should be, or the image token cannot be worked out.
    """
    loading = Loading(dtype, device_map, attn_implementation, kwargs)
    vision_source, text_source = _source_of(vision), _source_of(language)
    if isinstance(language, PreTrainedModel) and not language.can_generate():
        raise ValueError(
            f"{type(language).__name__} has no language head; expected a ...ForCausalLM or "
            "...ForConditionalGeneration. Load it with AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    if isinstance(vision, PreTrainedModel):
        vision_tower = find_vision_model(vision)
    else:
        vision_tower = load_vision_tower(vision, vision_revision, None, vision_quantization_config, loading)
    if image_token_id is None:
        image_token_id = _find_image_token_id(text_source, text_revision, loading)
    if image_size is None and vision_source is not None:
        image_size = processor_image_size(vision_source, vision_revision, loading)
    if isinstance(language, PreTrainedModel):
        language_model = language
    else:
        language_model = load_language_model(language, text_revision, None, quantization_config, loading)
    config = CromeVLMConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        vision_model_name_or_path=_name_of(vision),
        vision_revision=vision_revision,
        text_model_name_or_path=_name_of(language),
        text_revision=text_revision,
        vision_quantization_config=_quantized_on_load(vision_tower),
        text_quantization_config=_quantized_on_load(language_model),
        image_token_id=image_token_id,
        image_size=image_size,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        vision_pool_size=vision_pool_size,
        image_projection_bias=image_projection_bias,
        qformer_config=qformer.config if isinstance(qformer, QFormer) else qformer,
        num_query_tokens=qformer.query_tokens.shape[1] if isinstance(qformer, QFormer) else num_query_tokens,
        image_token_order=image_token_order,
    )
    given = qformer if isinstance(qformer, QFormer) else None
    return assemble(cls, config, vision_tower, language_model, loading, given).eval()


def assemble(
    cls: type[Composite],
    config: CromeVLMConfig,
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    loading: Loading,
    qformer: QFormer | None = None,
) -> Composite:
    """Put loaded backbones together: frozen, with fresh projections beside the embedding table."""
    model = cls(config, vision_tower=vision_tower, language_model=language_model, qformer=qformer)
    for part in filter(None, (vision_tower, language_model, qformer)):
        part.requires_grad_(False)
    between = {name: getattr(model, name) for name in BETWEEN if getattr(model, name, None) is not None}
    for name, part in between.items():
        if isinstance(loading.device_map, Mapping) and name in loading.device_map:
            part.to(loading.device_map[name])
        elif name == "qformer":
            part.to(next(language_model.get_input_embeddings().parameters()).device)
        if isinstance(loading.dtype, torch.dtype) and name != "qformer":
            part.to(loading.dtype)
    backbones = (*PARTS, "qformer")
    model._samples = take_samples({k: v for k, v in model.state_dict().items() if k.split(".", 1)[0] in backbones})
    maps = {part: getattr(getattr(model, part), "hf_device_map", None) for part in PARTS}
    if all(maps.values()):
        placed = {f"{part}.{k}".rstrip("."): device for part, places in maps.items() for k, device in places.items()}
        model.hf_device_map = placed | {name: next(part.parameters()).device for name, part in between.items()}
    return model


def load_vision_tower(
    name: str,
    revision: str | None,
    config: PreTrainedConfig | None,
    quantization_config: Quantization | None,
    loading: Loading,
) -> PreTrainedModel:
    """Load the tower by name; of a dual model the vision half is kept.

    Raises:
        ValueError: the named model has no vision tower, or one of other sizes than the configuration says.
    """
    arguments = _arguments("vision_tower", revision, quantization_config, loading)
    stored = AutoConfig.from_pretrained(name, **_revision(revision), **loading.hub_arguments)
    if stored.model_type in PARTS_CLASSES:  # without the checkpoint's own language model
        if config is not None:
            _check_sizes(name, stored.vision_config, config)
            stored.vision_config = _clean(config, quantization_config)
        return _with_quantizer(load_parts(name, stored, **arguments))
    if config is not None and type(stored) is type(config):
        _check_sizes(name, stored, config)
        arguments["config"] = _clean(config, quantization_config)
    elif config is not None and type(getattr(stored, "vision_config", None)) is type(config):
        _check_sizes(name, stored.vision_config, config)
        stored.vision_config = _clean(config, quantization_config)
        arguments["config"] = stored
    return _with_quantizer(vision_class(stored).from_pretrained(name, **arguments))


def _check_sizes(name: str, stored: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Refuse a tower whose weights cannot be those that a composite was trained with."""
    different = [
        f"{key}={getattr(stored, key)}, and this composite was made with {key}={getattr(config, key)}"
        for key in ("image_size", "patch_size", "hidden_size")
        if hasattr(stored, key) and getattr(stored, key) != getattr(config, key, None)
    ]
    if different:
        raise ValueError(
            f"The tower {name!r} has {'; '.join(different)}. Name the tower that it was made with, or join and train "
            "anew: CromeVLMForConditionalGeneration.from_backbones(vision=..., language=...)."
        )


def _with_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """The tower of a loaded model, which was quantised with the whole."""
    tower = find_vision_model(model)
    if hasattr(model, "hf_quantizer"):
        tower.hf_quantizer = model.hf_quantizer
    return tower


def load_qformer(name: str, revision: str | None, loading: Loading) -> QFormer:
    """Load the Q-Former and the query tokens of an InstructBLIP or BLIP-2 checkpoint."""
    arguments = {key: value for key, value in loading.for_part("vision_tower").items() if key != "device_map"}
    return qformer_of(load_parts(name, **_revision(revision), **arguments))


def parts_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of `from_backbones`' arguments, those that loading the parts of an InstructBLIP checkpoint by name takes."""
    return _arguments("vision_tower", kwargs.get("vision_revision"), None, _loading(kwargs))


def load_quantised_tower(name: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The tower as `from_backbones`' arguments say that it is quantised and loaded."""
    return load_vision_tower(
        name, kwargs.get("vision_revision"), None, kwargs["vision_quantization_config"], _loading(kwargs)
    )


def _loading(kwargs: dict[str, Any]) -> Loading:
    names = ("dtype", "device_map", "attn_implementation")
    others = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
    return Loading(**{name: kwargs.get(name) for name in names}, arguments=others)


def load_language_model(
    name: str,
    revision: str | None,
    config: PreTrainedConfig | None,
    quantization_config: Quantization | None,
    loading: Loading,
) -> PreTrainedModel:
    """Load the language model with its head by name, decoder-only or encoder-decoder.

    Raises:
        ValueError: the named model is neither.
    """
    arguments = _arguments("language_model", revision, quantization_config, loading)
    stored = AutoConfig.from_pretrained(name, **_revision(revision), **loading.hub_arguments)
    auto_class = language_class(config or stored)
    if config is None:
        return auto_class.from_pretrained(name, **arguments)
    config = _clean(config, quantization_config)
    ours, theirs = config.get_text_config(), stored.get_text_config()
    vocab_size = getattr(ours, "vocab_size", None)
    if vocab_size == getattr(theirs, "vocab_size", None):
        return auto_class.from_pretrained(name, config=config, **arguments)
    ours.vocab_size = theirs.vocab_size  # the table was resized after loading
    model = auto_class.from_pretrained(name, config=config, **arguments)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model


def language_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """The auto class that loads a language model with its head.

    Raises:
        ValueError: transformers has no such class for this configuration.
    """
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    has_remote_code = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class._model_mapping and not has_remote_code:
        raise ValueError(
            f"{config.model_type!r} is not a language model that {auto_class.__name__} knows. Pass a causal or "
            "encoder-decoder language model as language=."
        )
    return auto_class


def _arguments(
    part: str, revision: str | None, quantization_config: Quantization | None, loading: Loading
) -> dict[str, Any]:
    quantization: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
    return {**loading.for_part(part), **_revision(revision), **quantization}


def _revision(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _clean(config: PreTrainedConfig, quantization_config: Quantization | None) -> PreTrainedConfig:
    """The configuration without the quantisation of the last load, which would read as the checkpoint's own."""
    if quantization_config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _quantized_on_load(model: PreTrainedModel) -> dict[str, Any] | None:
    """The quantisation that loading applied; None where there is none or the checkpoint states its own."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    return quantization_to_dict(quantizer.quantization_config)


def _source_of(backbone: str | PreTrainedModel) -> str | None:
    """Where a backbone came from; None for a model object that came from nowhere."""
    if isinstance(backbone, PreTrainedModel):
        return backbone.config.name_or_path or None
    return str(backbone)


def _name_of(backbone: str | PreTrainedModel) -> str | None:
    """Where a backbone's weights can be loaded from again; None for an object, which may have changed since."""
    is_object = isinstance(backbone, PreTrainedModel)
    return None if is_object and getattr(backbone, "hf_quantizer", None) is None else _source_of(backbone)


def _find_image_token_id(name: str | None, revision: str | None, loading: Loading) -> int:
    if name is None:
        raise ValueError(
            "image_token_id is unknown: the language model object does not say where its tokenizer is. Write "
            "image_token_id=len(tokenizer), the id of a new `<image>` token, or that of the tokenizer's image token."
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **_revision(revision), **loading.hub_arguments)
    return ensure_image_token(tokenizer)[1]


def processor_image_size(name: str, revision: str | None, loading: Loading) -> tuple[int, int] | None:
    """What the tower's image processor makes of a picture; None: it has none, or keeps the picture's shape."""
    try:
        processor = AutoImageProcessor.from_pretrained(name, **_revision(revision), **loading.hub_arguments)
    except (OSError, ValueError):
        return None  # a tower without an image processor states its size in its configuration
    return fixed_image_size(processor)
