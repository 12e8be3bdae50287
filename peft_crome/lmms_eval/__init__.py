"""A plug-in for lmms-eval: `lmms-eval --model peft_crome --model_args pretrained=...,adapter=...`."""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """Return the manifests for lmms-eval's entry point `lmms_eval.models`. The model is imported when it is needed."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="peft_crome", chat_class_path=f"{__name__}.model.AdaptedModel")
