"""The composite model: any vision tower and any language model; importing it registers the auto classes."""

from ..backbone.compat import check_composite

check_composite()

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from . import trainers  # noqa: F401  # registers what a Trainer must refuse
from .configuration_crome_vlm import CromeVLMConfig
from .modeling_crome_vlm import CromeVLMForConditionalGeneration
from .pipeline import read_images_of_pipelines
from .processing_crome_vlm import CromeVLMProcessor

AutoConfig.register(CromeVLMConfig.model_type, CromeVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(CromeVLMConfig, CromeVLMForConditionalGeneration, exist_ok=True)
# TRL falls back on this class for a model that transformers does not know.
AutoModelForCausalLM.register(CromeVLMConfig, CromeVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(CromeVLMConfig, CromeVLMProcessor, exist_ok=True)
read_images_of_pipelines()

__all__ = ["CromeVLMConfig", "CromeVLMForConditionalGeneration", "CromeVLMProcessor"]
