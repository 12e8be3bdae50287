"""Build the composite from a vision tower and a language model."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .backbones import PARTS, Loading, Quantization, load_language_model, load_vision_tower, processor_image_size
from .configuration_crome_vlm import IMAGE_OPTIONS, CromeVLMConfig, quantization_to_dict
from .fingerprint import take_samples
from .image_token import ensure_image_token
from .qformer import QFormer
from .vision import find_vision_model

Composite = TypeVar("Composite", bound=PreTrainedModel)
BETWEEN = ("image_projection", "qformer", "text_projection")


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
    qformer: QFormer | PreTrainedConfig | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Composite:
    """Join a vision tower and a language model. Both are frozen; the new layers between them train.

    Args:
        cls: the composite's class.
        vision: name of a tower (or of a dual model such as CLIP), or a model object. An object is used as it is and
            stored with the composite, since its weights may have changed since it was loaded.
        language: name of a causal or encoder-decoder language model, or a model object, treated likewise. Only a
            quantized object is stored by the name that it was loaded by.
        vision_revision: branch, tag or commit of the tower's repository.
        text_revision: branch, tag or commit of the language model's repository.
        quantization_config: quantizes the language model while it is loaded.
        vision_quantization_config: quantizes the tower while it is loaded.
        dtype: dtype of both backbones; None: each as in its checkpoint. Model objects keep theirs.
        device_map: as in transformers; a dictionary names the composite's modules.
        attn_implementation: one for both, or {"vision_config": ..., "text_config": ...}.
        image_token_id: id of the placeholder; None: by the rule that the processor follows as well.
        image_size: pixels, one number or (height, width); None: the size from the tower's image processor, else the
            tower's size.
        qformer: a Q-Former's configuration, or its dictionary, for a new one that trains; or a trained one, which is
            used frozen; None: the composite has no Q-Former.
        kwargs: how image tokens are made, as in `CromeVLMConfig`: vision_feature_layer,
            vision_feature_select_strategy, vision_pool_size, image_projection_bias, num_query_tokens and
            image_token_order; and other arguments of `from_pretrained` for both backbones (`cache_dir`, `token`, ...).
    Returns:
        The composite in evaluation mode.
    Raises:
        ValueError: a part is of the wrong kind, or the image token cannot be determined.
    """
    options = {name: kwargs.pop(name) for name in IMAGE_OPTIONS if name in kwargs}
    if isinstance(qformer, QFormer):
        options["num_query_tokens"] = qformer.query_tokens.shape[1]
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
        qformer_config=qformer.config if isinstance(qformer, QFormer) else qformer,
        **options,
    )
    trained_qformer = qformer if isinstance(qformer, QFormer) else None
    return assemble(cls, config, vision_tower, language_model, loading, trained_qformer)


def assemble(
    cls: type[Composite],
    config: CromeVLMConfig,
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    loading: Loading,
    qformer: QFormer | None = None,
) -> Composite:
    """Put loaded backbones together, frozen and in evaluation mode, with new projections between them."""
    model = cls(config, vision_tower=vision_tower, language_model=language_model, qformer=qformer)
    for part in (part for part in (vision_tower, language_model, qformer) if part is not None):
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
    return model.eval()


def _quantized_on_load(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return the quantization that loading applied; None if there is none or the checkpoint states it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    return quantization_to_dict(quantizer.quantization_config)


def _source_of(backbone: str | PreTrainedModel) -> str | None:
    """Return where a backbone came from; None for a model object without a name."""
    if isinstance(backbone, PreTrainedModel):
        return backbone.config.name_or_path or None
    return str(backbone)


def _name_of(backbone: str | PreTrainedModel) -> str | None:
    """Return where a backbone's weights can be loaded again; None for an object, which may have changed since."""
    is_object = isinstance(backbone, PreTrainedModel)
    return None if is_object and getattr(backbone, "hf_quantizer", None) is None else _source_of(backbone)


def _find_image_token_id(name: str | None, revision: str | None, loading: Loading) -> int:
    if name is None:
        raise ValueError(
            "image_token_id is unknown: the language model object does not name its tokenizer. Write "
            "image_token_id=len(tokenizer), the id of a new `<image>` token, or that of the tokenizer's image token."
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **loading.for_hub(revision))
    return ensure_image_token(tokenizer)[1]
