"""vLLM's entry point `vllm.general_plugins`: for each of its model classes, a class with CROME's branches."""

from __future__ import annotations

COMPOSITE = "CromeVLMForConditionalGeneration"
PREFIX = "Crome"  # before the host's architecture, in an exported model's config.json


def register() -> None:
    """Register the composite, and an architecture `Crome...` for each host; its class is created when it is needed."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if COMPOSITE in ModelRegistry.get_supported_archs():
        return
    ModelRegistry.register_model(COMPOSITE, f"{__name__}.composite:{COMPOSITE}")
    for name in list(ModelRegistry.get_supported_archs()):
        ModelRegistry.register_model(PREFIX + name, f"{__name__}.models:{PREFIX}{name}")
        if name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]
