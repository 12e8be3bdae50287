"""Join the tower, Q-Former and projection of an InstructBLIP or BLIP-2 checkpoint with any language model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .assembly import Composite, from_backbones
from .backbones import Loading, load_vision_tower
from .blip_parts import check_has_parts, load_parts, qformer_of
from .configuration_crome_vlm import HUB_ARGUMENTS


def from_instructblip(
    cls: type[Composite], checkpoint: str | PreTrainedModel, *, language: str | PreTrainedModel, **kwargs: Any
) -> Composite:
    """Join an InstructBLIP checkpoint's tower, Q-Former and projection with any language model.

    The checkpoint's language projection becomes `text_projection` if the new language model has its width (Vicuna
    1.5 for 1.1); otherwise it is initialized, as the image projection always is. Both train; the rest is frozen.

    Args:
        cls: the composite's class.
        checkpoint: name of an InstructBLIP or BLIP-2 checkpoint, whose language model is not loaded, or a model.
        language: name of a causal or encoder-decoder language model, or a model object, which is used as it is.
        kwargs: arguments of `from_backbones`; `vision_revision` is the checkpoint's. `vision_quantization_config`
            applies to the tower only: the Q-Former trains, and is stored, unquantized.
    Returns:
        The composite in evaluation mode.
    Raises:
        ValueError: the checkpoint is of another type or a quantized object, or as in `from_backbones`.
    """
    hub_arguments = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    loading = Loading(kwargs.get("dtype"), kwargs.get("device_map"), kwargs.get("attn_implementation"), hub_arguments)
    revision, quantization = kwargs.get("vision_revision"), kwargs.get("vision_quantization_config")
    if isinstance(checkpoint, PreTrainedModel):
        parts, name = checkpoint, checkpoint.config.name_or_path
        check_has_parts(parts.config, type(parts).__name__)
    else:
        checkpoint = name = str(checkpoint)
        parts = load_parts(name, **loading.for_part("vision_tower", revision))
    if getattr(parts, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{name or type(parts).__name__} is quantized, its Q-Former and projection too, which are to train. Name "
            "a checkpoint that is not: from_instructblip('...', language=..., vision_quantization_config=...)."
        )
    qformer, tower = qformer_of(parts), parts.vision_model
    if isinstance(checkpoint, str) and quantization is not None:
        tower = parts.vision_model = load_vision_tower(name, revision, None, quantization, loading)
    tower.config.name_or_path = qformer.config.name_or_path = name
    model = from_backbones(cls, tower, language, qformer=qformer, **kwargs)
    if isinstance(checkpoint, str):  # loaded by name, so the name gives these weights
        config = model.config
        config.vision_model_name_or_path = config.qformer_model_name_or_path = name
        config.qformer_revision = config.vision_revision
    projection, text_projection = parts.language_projection, model.text_projection
    if projection.weight.shape == text_projection.weight.shape:
        text_projection.load_state_dict(projection.state_dict())
    return model
